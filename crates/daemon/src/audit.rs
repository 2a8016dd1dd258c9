//! The audit log: one JSON line per request, refused ones included, written before the answer is sent.
//!
//! A line tells who asked for what and how it went. It never holds a query, a body or a header but the
//! user agent's, so no secret can get into it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;

/// Longest user agent that is written, characters.
const UA_LEN_MAX: usize = 256;

/// One request.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) actor: Option<&'a str>,
    pub(crate) remote: Option<String>,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) status: u16,
    pub(crate) latency: Duration,
    pub(crate) ua: Option<&'a str>,
}

#[derive(Serialize)]
struct Line<'a> {
    ts: String,
    request_id: &'a str,
    actor: Option<&'a str>,
    remote: Option<&'a str>,
    method: &'a str,
    path: &'a str,
    status: u16,
    latency_us: u64,
    ua: Option<&'a str>,
}

/// The audit log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the audit log {}; name another with --audit-log", .path.display())]
pub struct Error {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Where audit lines go.
#[derive(Debug)]
pub struct Audit {
    sink: Option<Sink>,
}

#[derive(Debug)]
struct Sink {
    path: PathBuf,
    file: Mutex<File>,
}

impl Audit {
    /// Writes nothing.
    pub fn off() -> Self {
        Self { sink: None }
    }

    /// Appends to a file, making it and its directory if need be.
    pub fn to_file(path: &Path) -> Result<Self, Error> {
        let file = Mutex::new(open(path)?);
        let path = path.to_owned();
        Ok(Self {
            sink: Some(Sink { path, file }),
        })
    }

    /// Opens the file anew, after it was renamed by a log rotation. Keeps the old one if that fails.
    pub fn reopen(&self) -> Result<(), Error> {
        if let Some(sink) = &self.sink {
            let fresh = open(&sink.path)?;
            *sink.file.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
        }
        Ok(())
    }

    pub(crate) fn write(&self, entry: &Entry<'_>) -> io::Result<()> {
        let Some(sink) = &self.sink else {
            return Ok(());
        };
        let line = Line {
            ts: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            request_id: entry.request_id,
            actor: entry.actor,
            remote: entry.remote.as_deref(),
            method: entry.method,
            path: entry.path,
            status: entry.status,
            latency_us: u64::try_from(entry.latency.as_micros()).unwrap_or(u64::MAX),
            ua: entry.ua.map(shortened),
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        // One write of one line: lines of two daemons or of a rotation never mix.
        sink.file
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&text)
    }
}

fn shortened(text: &str) -> &str {
    let end = text
        .char_indices()
        .nth(UA_LEN_MAX)
        .map_or(text.len(), |(at, _)| at);
    &text[..end]
}

fn open(path: &Path) -> Result<File, Error> {
    let failed = |source| Error {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    let mut options = OpenOptions::new();
    options
        .create(true)
        .append(true)
        .mode(0o640)
        .open(path)
        .map_err(failed)
}

#[cfg(test)]
mod tests;
