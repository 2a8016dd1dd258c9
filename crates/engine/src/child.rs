//! The process of a VM, whatever runs it: started and not watched yet, watched to its end, found again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkd_host::process::{self as host, Process};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::output::Output;
use crate::rundir::failed;
use crate::{Error, Exit, ProcessIdentity};
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

/// A process that is watched to its end. Until [`Watched::keep`] is called, letting go kills it.
#[derive(Debug)]
pub(crate) struct Watched {
    process: Arc<Process>,
    output: Arc<Output>,
    exit: watch::Receiver<Option<Exit>>,
    kept: AtomicBool,
}

impl Watched {
    /// Watches a process. `meaning` says of its end how the VM ended; before it is asked, what is `seen` of the
    /// process is waited for a little, until `closed` holds.
    pub(crate) fn attach<T: Send + Sync + 'static>(
        process: Process,
        output: Arc<Output>,
        mut seen: watch::Receiver<T>,
        closed: fn(&T) -> bool,
        meaning: impl FnOnce(Option<host::Exit>, &T) -> Exit + Send + 'static,
    ) -> Result<Watched, Error> {
        let process = Arc::new(process);
        if let Err(error) = process.set_oom_score_adj(OOM_SCORE) {
            tracing::debug!(%error, "out-of-memory score stays as it is");
        }
        let pidfd = process.pidfd().try_clone_to_owned();
        let pidfd = pidfd.and_then(crate::fd::readable);
        let (tell, exit) = watch::channel(None);
        let watched = Watched {
            process: Arc::clone(&process),
            output,
            exit,
            kept: AtomicBool::new(false),
        };
        let pid = process.identity().pid;
        let pidfd = pidfd.map_err(failed("watch", Path::new(&format!("/proc/{pid}"))))?;
        tokio::spawn(async move {
            let exit = match ended(&process, &pidfd, &mut seen, closed).await {
                Ok(exit) => meaning(exit, &seen.borrow()),
                Err(_) => Exit::Unknown,
            };
            tracing::debug!(pid, ?exit, "a VM's process ended");
            tell.send_replace(Some(exit));
        });
        Ok(watched)
    }

    /// From now on, letting go of this value leaves the process alone.
    pub(crate) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    pub(crate) fn identity(&self) -> ProcessIdentity {
        let identity = self.process.identity();
        ProcessIdentity {
            pid: identity.pid,
            start_ticks: identity.start_ticks,
        }
    }

    /// The error of a process that closed its control socket.
    pub(crate) async fn gone(&self, step: &'static str) -> Error {
        match tokio::time::timeout(KILL_LIMIT, self.exited()).await {
            Ok(exit) => Error::Exited {
                exit: describe(&exit),
                output: self.output.last_words(LAST_WORDS).await,
            },
            Err(_) => Error::Control {
                step,
                detail: "its control socket is closed".to_owned(),
            },
        }
    }

    /// Whether the process is gone already.
    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// The error if the process is gone already.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        match self.has_ended() {
            true => Err(self.gone("use").await),
            false => Ok(()),
        }
    }

    /// Kills the process and waits until it is gone.
    pub(crate) async fn kill(&self) -> Result<(), Error> {
        self.process.kill().map_err(|error| Error::Control {
            step: "kill",
            detail: chain(&error),
        })?;
        match tokio::time::timeout(KILL_LIMIT, self.exited()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Timeout {
                step: "end when killed",
                millis: KILL_LIMIT.as_millis() as u64,
            }),
        }
    }

    /// Waits until the process is gone.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(Exit::Unknown),
            // The watcher is gone: the runtime is being shut down.
            Err(_) => Exit::Unknown,
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed)
            && let Err(error) = self.process.kill()
        {
            tracing::error!(%error, "a VM's process is left over");
        }
    }
}

fn describe(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("status {code}"),
        Exit::Signal(7) => {
            "signal 7: the disk that holds its memory may be full or damaged".to_owned()
        }
        Exit::Signal(9) => "signal 9: it was killed, perhaps for want of memory".to_owned(),
        Exit::Signal(31) => "signal 31: it made a system call that is forbidden to it".to_owned(),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::Reset => "the guest reset its machine".to_owned(),
        Exit::Unknown => "nobody knows how".to_owned(),
    }
}

/// Waits for the end of a process, reaps it, and waits a little for what it said before it left, which may still be
/// on its way: until `closed` holds. An error is told, and means that nobody knows.
async fn ended<T>(
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

/// The same of one that has `argument` on its command line; one that has not is none of ours. Blocks.
pub(crate) fn adopt_named(
    identity: ProcessIdentity,
    argument: &str,
) -> Result<Option<Process>, Error> {
    let Some(process) = adopt(identity)? else {
        return Ok(None);
    };
    let arguments = host::command_line(identity.pid).map_err(|error| not_found(&error))?;
    let is_ours =
        arguments.is_some_and(|arguments| arguments.iter().any(|found| found == argument));
    Ok(is_ours.then_some(process))
}

/// Why a program could not be started; `missing` is the error of one that is not there.
pub(crate) fn not_started(
    program: &Path,
    error: host::Error,
    missing: fn(&Path) -> Error,
) -> Error {
    match error {
        host::Error::Spawn { source, .. } => cannot_run(program, source, missing),
        other => cannot_run(program, io::Error::other(other), missing),
    }
}

/// What a program answers when it is run with this argument; `missing` as above. Blocks.
pub(crate) fn ask(
    program: &Path,
    argument: &str,
    missing: fn(&Path) -> Error,
) -> Result<std::process::Output, Error> {
    let output = Command::new(program).arg(argument).output();
    output.map_err(|source| cannot_run(program, source, missing))
}

fn cannot_run(program: &Path, source: io::Error, missing: fn(&Path) -> Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound => missing(program),
        _ => Error::Spawn {
            program: program.display().to_string(),
            source,
        },
    }
}

/// What keeps a process from being looked at.
fn not_found(error: &host::Error) -> Error {
    Error::Control {
        step: "find the process",
        detail: chain(error),
    }
}
