//! The one place of xtask that prints.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks"
)]

use std::error::Error;
use std::io::Write as _;

/// Says what is being done, on stderr.
pub(crate) fn step(text: &str) {
    eprintln!("xtask: {text}");
}

/// Prints one line of results on stdout.
pub(crate) fn line(text: &str) {
    println!("{text}");
    std::io::stdout().flush().ok();
}

/// Prints an error with its chain of causes.
pub(crate) fn error(error: &dyn Error) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    eprintln!("xtask: {text}");
}
