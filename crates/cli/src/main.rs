//! forkd, the command line of one node.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    forkd_cli::main()
}
