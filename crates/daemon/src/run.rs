//! The daemon as a program: log, runtime, exit code. Shared by `forkd-controller serve` and `forkd serve`.

use std::io::IsTerminal;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::args::ServeArgs;
use crate::config::Config;
use crate::http::error::chain;

/// Exit code for settings that cannot be served, as for a wrong command line.
const EXIT_USAGE: u8 = 2;

/// Whether a log on standard error has colours: where somebody looks at it, unless they want none
/// (<https://no-color.org>).
pub fn log_in_colours() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
    std::io::stderr().is_terminal() && !unwanted
}

/// Runs the daemon with these flags until a signal ends it.
pub fn run_serve(args: ServeArgs) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(log_in_colours())
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
