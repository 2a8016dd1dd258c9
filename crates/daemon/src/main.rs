//! forkd-controller, the daemon of one node.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use forkd_daemon::ServeArgs;

/// Owns the snapshots and sandboxes of one node, and serves them over HTTP.
#[derive(Debug, Parser)]
#[command(name = "forkd-controller", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground.
    ///
    /// SIGTERM and SIGINT end it once running requests are answered; SIGHUP reopens the audit log and
    /// reads tokens and certificates again. The log goes to standard error; RUST_LOG sets its level.
    Serve(Box<ServeArgs>),
    /// Print the OpenAPI document of the interface.
    Openapi,
}

fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    match command {
        Command::Serve(args) => forkd_daemon::run_serve(*args),
        Command::Openapi => {
            use std::io::Write;
            let document = forkd_daemon::openapi::document_json();
            match std::io::stdout().write_all(document.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
    }
}
