//! The host's end of a guest's vsock: a UNIX socket, on which one asks for a port of the guest's.
//!
//! ```text
//!   host                monitor
//!   CONNECT 49983 ──►
//!                 ◄──   OK 1073741824      and from then on it is the stream; or the end: nobody listens there
//! ```

use std::io;
use std::time::Duration;

use forkd_wire::agent::AGENT_PORT;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::Error;
use crate::child::Watched;
use crate::rundir::{RunDir, failed};

/// How long the guest may take to accept or refuse a connection.
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// The longest answer to a dial, `OK 4294967295`.
const ANSWER_MAX: usize = 16;

/// Connects to the agent, through the socket of this name in the directory of a VM, which has this process. One that
/// went meanwhile is told with its last words.
pub(crate) async fn dial(process: &Watched, dir: &RunDir, name: &str) -> Result<UnixStream, Error> {
    let asked = reach(dir, name).await;
    if asked.is_err() {
        process.check().await?;
    }
    asked
}

async fn reach(dir: &RunDir, name: &str) -> Result<UnixStream, Error> {
    match tokio::time::timeout(DIAL_LIMIT, ask(dir, name)).await {
        Ok(asked) => asked.map_err(failed("reach the guest's agent through", &dir.file(name))),
        Err(_) => Err(Error::Timeout {
            step: "connect to the guest's agent",
            millis: u64::try_from(DIAL_LIMIT.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

async fn ask(dir: &RunDir, name: &str) -> io::Result<UnixStream> {
    let mut stream = dir.connect_later(name).await?;
    let greeting = format!("CONNECT {AGENT_PORT}\n");
    stream.write_all(greeting.as_bytes()).await?;
    // Byte by byte: what follows the answer belongs to the stream.
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    while answer.last() != Some(&b'\n') && answer.len() < ANSWER_MAX {
        answer.push(stream.read_u8().await?);
    }
    match answer.starts_with(b"OK ") {
        true => Ok(stream),
        false => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}
