//! The daemon as a program: log, runtime, exit code. Shared by `forkd-controller serve` and `forkd serve`.

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::args::ServeArgs;
use crate::config::Config;
use crate::http::error::chain;

/// Exit code for settings that cannot be served, as for a wrong command line.
const EXIT_USAGE: u8 = 2;

/// Runs the daemon with these flags until a signal ends it.
pub fn run_serve(args: ServeArgs) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A log that is there already is as good.
    let _ = log.try_init();
    let config = match Config::from_args(args) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(error = %error, "cannot start threads");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(crate::serve(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
