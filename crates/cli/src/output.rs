//! The only place that prints. Data goes to standard output, everything else to standard error.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Writes text to standard output as it is.
pub(crate) fn data(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// Writes a line to standard output.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes one value as indented JSON and a line break to standard output.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::caused("cannot write the result as JSON", &error))?;
    text.push('\n');
    data(&text)
}

/// Writes bytes to standard output.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| closed(&error))
}

/// Writes bytes to standard error: a guest's own, unchanged.
pub(crate) fn error_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stderr().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| closed(&error))
}

/// Says something to the person who watches. Nobody watching is no failure.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Tells a failure to the person who watches.
pub(crate) fn failure(failure: &Failure) {
    for line in failure.lines() {
        say(&line);
    }
}

/// Whether somebody watches progress on a terminal.
pub(crate) fn is_watched() -> bool {
    io::stderr().is_terminal()
}

/// A reader that went away (`forkd ls | head -1`) is no news; anything else is.
fn closed(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        // 128 + SIGPIPE, what a shell reports for a program that the signal ended.
        Failure::silent(141)
    } else {
        Failure::caused("cannot write to standard output", error)
    }
}
