//! As much HTTP as it takes to give orders over a Unix socket: one request, one answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// Longest answer that is read.
const BODY_MAX: usize = 64 << 10;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The socket broke.
    #[error("its socket broke")]
    Socket(#[source] io::Error),
    /// What came back is no HTTP.
    #[error("its answer is no HTTP: {0:?}")]
    Answer(String),
    /// An answer that says no.
    #[error("status {status}: {message}")]
    Status {
        /// The status.
        status: u16,
        /// Its own words.
        message: String,
    },
}

/// A connection to one machine's socket.
#[derive(Debug)]
pub(super) struct Connection(BufReader<UnixStream>);

impl Connection {
    /// Connects. An answer may take as long as `patience`.
    pub(super) fn open(socket: &Path, patience: Duration) -> io::Result<Connection> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        Ok(Connection(BufReader::new(stream)))
    }

    /// Sends a request.
    pub(super) fn send(&mut self, method: &str, path: &str, body: &Value) -> Result<(), Error> {
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let sent = self.0.get_mut().write_all(request.as_bytes());
        sent.map_err(Error::Socket)
    }

    /// Waits for the answer. Anything but success is an error with the machine's own words.
    pub(super) fn answer(&mut self) -> Result<(), Error> {
        let line = self.line()?;
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| {
            let (status, _) = rest.split_once(' ').unwrap_or((rest, ""));
            status.parse::<u16>().ok()
        });
        let status = status.ok_or_else(|| Error::Answer(line.clone()))?;
        let mut length = 0;
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().map_err(|_| Error::Answer(line))?;
            }
        }
        let mut body = vec![0; std::cmp::min(length, BODY_MAX)];
        self.0.read_exact(&mut body).map_err(Error::Socket)?;
        if (200..300).contains(&status) {
            return Ok(());
        }
        let message = serde_json::from_slice::<Value>(&body).ok();
        let message = message.and_then(|value| Some(value["fault_message"].as_str()?.to_owned()));
        Err(Error::Status {
            status,
            message: message.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned()),
        })
    }

    /// One line of the head, without its end.
    fn line(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        let mut limited = (&mut self.0).take(BODY_MAX as u64);
        limited.read_line(&mut line).map_err(Error::Socket)?;
        match line.strip_suffix("\r\n") {
            Some(whole) => Ok(whole.to_owned()),
            None => Err(Error::Answer(line)),
        }
    }
}
