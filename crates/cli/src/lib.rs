//! forkd: the command line. Parses, calls a node, shows the answer.
//!
//! ```text
//!   args ─► commands ─► session ─► client ─┬─ HTTP ─► daemon
//!                                          └─ router of a node in this process ("embedded")
//! ```
//!
//! Nothing here decides about snapshots or sandboxes; that is the heart's. Standard output is data only.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

pub mod agent;
pub mod args;
pub mod client;
mod commands;
mod doctor;
mod embedded;
pub mod failure;
mod human;
mod interrupt;
mod output;
mod process;
mod progress;
mod query;
mod session;
mod stats;
mod table;

use args::{Cli, Command};
use failure::{Failure, exit};

/// The whole program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, everything else is wrong usage.
            let code = if error.use_stderr() {
                exit::USAGE
            } else {
                exit::OK
            };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let common = cli.common;
    match cli.command {
        // The daemon brings its own log, runtime and signals.
        Command::Serve(args) => forkd_daemon::run_serve(*args),
        command => run(Cli { common, command }),
    }
}

fn run(cli: Cli) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(forkd_daemon::log_in_colours())
        .with_writer(std::io::stderr);
    // A log that is there already is as good.
    let _ = log.try_init();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::caused("cannot start threads", &error);
            output::failure(&failure);
            return ExitCode::from(failure.exit());
        }
    };
    let code = runtime.block_on(commands::run(cli));
    // A thread may still wait for standard input; nothing else is under way.
    runtime.shutdown_background();
    code
}
