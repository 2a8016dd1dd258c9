//! The process of a VM, whatever runs it: started and not watched yet, watched to its end, found again.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use forkd_host::process::{self as host, Process};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::{Error, ProcessIdentity};
use forkd_host::chain;

/// How long a killed process may take to be gone.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How long to wait for last words after the end.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(500);
/// Sandboxes go before the daemon when the host's memory runs out.
pub(crate) const OOM_SCORE: i16 = 500;

/// A new process that nobody watches yet; killed when it is dropped before somebody does.
pub(crate) struct Guard(Option<Process>);

impl Guard {
    pub(crate) fn new(process: Process) -> Guard {
        Guard(Some(process))
    }

    pub(crate) fn process(&self) -> &Process {
        self.0
            .as_ref()
            .expect("only disarm takes it, and the guard with it")
    }

    pub(crate) fn disarm(mut self) -> Process {
        self.0.take().expect("a guard is disarmed once")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            let killed = process.kill().and_then(|()| process.wait_for(LAST_WORDS));
            if let Err(error) = killed {
                tracing::error!(%error, "a process of a VM may be left over");
            }
        }
    }
}

/// Waits for the end of a process, reaps it, and waits a little for what it said before it left, which may still be
/// on its way: until `closed` holds. An error is told, and means that nobody knows.
pub(crate) async fn ended<T>(
    process: &Process,
    pidfd: &AsyncFd<OwnedFd>,
    seen: &mut watch::Receiver<T>,
    closed: impl FnMut(&T) -> bool,
) -> io::Result<Option<host::Exit>> {
    if let Err(error) = pidfd.readable().await {
        tracing::error!(%error, "a process cannot be watched");
        return Err(error);
    }
    let exit = process.try_wait().unwrap_or_else(|error| {
        tracing::error!(%error, "a process cannot be reaped");
        None
    });
    let _ = tokio::time::timeout(LAST_WORDS, seen.wait_for(closed)).await;
    Ok(exit)
}

/// Finds a process that an earlier daemon started; `None`: it is gone. Blocks.
pub(crate) fn adopt(identity: ProcessIdentity) -> Result<Option<Process>, Error> {
    let wanted = host::Identity {
        pid: identity.pid,
        start_ticks: identity.start_ticks,
    };
    Process::adopt(wanted).map_err(|error| not_found(&error))
}

/// What keeps a process from being looked at.
pub(crate) fn not_found(error: &host::Error) -> Error {
    Error::Control {
        step: "find the process",
        detail: chain(error),
    }
}
