//! A Firecracker process: asked, watched until it is gone.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forkd_host::process::{self as host, Process};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::client;
use super::names::{API, CONSOLE_LOG};
use super::request::{Request, parse_running};
use crate::child::Watched;
use crate::output::Output;
use crate::rundir::{RunDir, failed};
use crate::{Error, Exit};

/// How long a new process may take to listen, on a host with far more VMs than cores.
const LISTEN_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked whether it does: it makes its socket itself.
const LISTEN_RETRY: Duration = Duration::from_millis(1);
/// How Linux begins its last words.
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// How much of the console's end is read for them.
const LAST_WORDS: u64 = 64 << 10;

/// A Firecracker process that somebody holds on to.
#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) process: Watched,
    run_dir: Arc<RunDir>,
}

impl Monitor {
    /// Takes a process. `console` tells when its console has come to its end.
    pub(super) fn attach(
        process: Process,
        run_dir: Arc<RunDir>,
        output: Arc<Output>,
        console: watch::Receiver<bool>,
    ) -> Result<Monitor, Error> {
        let log = run_dir.file(CONSOLE_LOG);
        let meaning = move |exit, _: &bool| meaning(exit, &log);
        let process = Watched::attach(process, output, console, |ended| *ended, meaning)?;
        Ok(Monitor { process, run_dir })
    }

    /// Waits until a new process listens.
    pub(super) async fn listening(&self) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            match self.connect().await {
                Ok(_) => return Ok(()),
                Err(error) if !is_early(&error) => {
                    return Err(failed("connect to", &self.run_dir.file(API))(error));
                }
                Err(_) => self.process.check().await?,
            }
            if began.elapsed() > LISTEN_LIMIT {
                return Err(Error::Timeout {
                    step: "listen on its API socket",
                    millis: LISTEN_LIMIT.as_millis() as u64,
                });
            }
            tokio::time::sleep(LISTEN_RETRY).await;
        }
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        self.run_dir.connect_later(API).await
    }

    /// Makes a request. A process that is gone is told with its last words.
    pub(super) async fn ask(&self, request: Request<'_>) -> Result<Bytes, Error> {
        let step = request.step();
        self.process.check().await?;
        let Ok(stream) = self.connect().await else {
            return Err(self.process.gone(step).await);
        };
        match client::ask(stream, &request).await {
            Ok(answer) => Ok(answer),
            Err(client::Error::Refused(detail)) => Err(Error::Control { step, detail }),
            Err(client::Error::Late) => Err(Error::Timeout {
                step,
                millis: request.deadline().as_millis() as u64,
            }),
            Err(client::Error::Closed) => Err(self.process.gone(step).await),
        }
    }

    /// Whether the guest runs.
    pub(super) async fn is_running(&self) -> Result<bool, Error> {
        let answer = self.ask(Request::Status).await?;
        parse_running(&answer).ok_or_else(|| Error::Control {
            step: Request::Status.step(),
            detail: format!("not understood: {}", String::from_utf8_lossy(&answer)),
        })
    }
}

/// There is no socket yet, or nobody listens on it yet.
fn is_early(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
    )
}

/// How a process ended as far as the guest is concerned. A guest that panics and one that powers off both reset the
/// machine, and Firecracker leaves alike; but the one that panics says so.
fn meaning(exit: Option<host::Exit>, console: &Path) -> Exit {
    match exit {
        Some(host::Exit::Signal(signal)) => Exit::Signal(signal),
        Some(host::Exit::Code(0)) if panicked(console).unwrap_or(false) => Exit::Reset,
        Some(host::Exit::Code(code)) => Exit::Code(code),
        Some(host::Exit::Unknown) | None => Exit::Unknown,
    }
}

/// Whether a console ends with a kernel's panic.
pub(super) fn panicked(console: &Path) -> io::Result<bool> {
    let mut file = File::open(console)?;
    let size = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(size.saturating_sub(LAST_WORDS)))?;
    let mut end = Vec::new();
    file.take(LAST_WORDS).read_to_end(&mut end)?;
    Ok(end.windows(PANIC.len()).any(|bytes| bytes == PANIC))
}
