//! A QEMU process: asked, watched until it is gone.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkd_host::process::{self as host, Process};
use serde_json::Value;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::client::{self, Client, Seen};
use super::request::{Command, Shutdown, Status, parse_set, parse_status};
use crate::child::{self, KILL_LIMIT, LAST_WORDS, OOM_SCORE};
use crate::output::Output;
use crate::rundir::failed;
use crate::{Error, Exit, ProcessIdentity};

/// How long a loaded VM may take to run, on a host with far more VMs than cores.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// A QEMU process that somebody holds on to. Until [`Monitor::keep`] is called, letting go kills it.
#[derive(Debug)]
pub(super) struct Monitor {
    process: Arc<Process>,
    client: Client,
    output: Arc<Output>,
    exit: watch::Receiver<Option<Exit>>,
    kept: AtomicBool,
}

impl Monitor {
    /// Takes a process and a connection to its control socket.
    pub(super) fn attach(
        process: Process,
        control: UnixStream,
        output: Arc<Output>,
    ) -> Result<Monitor, Error> {
        let client = Client::new(control);
        let process = Arc::new(process);
        if let Err(error) = process.set_oom_score_adj(OOM_SCORE) {
            tracing::debug!(%error, "out-of-memory score stays as it is");
        }
        let pidfd = process.pidfd().try_clone_to_owned();
        let pidfd = pidfd.and_then(crate::fd::readable);
        let (tell, exit) = watch::channel(None);
        let monitor = Monitor {
            process: Arc::clone(&process),
            client,
            output,
            exit,
            kept: AtomicBool::new(false),
        };
        let pid = process.identity().pid;
        let pidfd = pidfd.map_err(failed("watch", Path::new(&format!("/proc/{pid}"))))?;
        let seen = monitor.client.seen();
        tokio::spawn(async move {
            let exit = watch_end(&process, &pidfd, seen).await;
            tracing::debug!(pid, ?exit, "QEMU ended");
            tell.send_replace(Some(exit));
        });
        Ok(monitor)
    }

    /// From now on, letting go of this value leaves the process alone.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    pub(super) fn identity(&self) -> ProcessIdentity {
        let identity = self.process.identity();
        ProcessIdentity {
            pid: identity.pid,
            start_ticks: identity.start_ticks,
        }
    }

    /// Runs a command. A process that is gone is told with its last words.
    pub(super) async fn command(&self, command: Command) -> Result<Value, Error> {
        self.command_with(command, None).await
    }

    /// Has CPU and device state written into a file. The vCPUs stand still.
    pub(super) async fn save_devices(&self, file: File) -> Result<(), Error> {
        let taken = self.command_with(Command::TakeFile, Some(&file)).await?;
        let set = parse_set(&taken).ok_or_else(|| Error::Control {
            step: Command::TakeFile.step(),
            detail: format!("not understood: {taken}"),
        })?;
        let saved = self.command(Command::SaveDevices(set)).await;
        let dropped = self.command(Command::DropFile(set)).await;
        saved.and(dropped).map(|_| ())
    }

    async fn command_with(&self, command: Command, file: Option<&File>) -> Result<Value, Error> {
        let step = command.step();
        match self.client.command(&command, file).await {
            Ok(value) => Ok(value),
            Err(client::Error::Refused(detail)) => Err(Error::Control { step, detail }),
            Err(client::Error::Late) => Err(Error::Timeout {
                step,
                millis: command.deadline().as_millis() as u64,
            }),
            Err(client::Error::Closed) => Err(self.gone(step).await),
        }
    }

    /// Whether the guest runs.
    pub(super) async fn status(&self) -> Result<Status, Error> {
        let value = self.command(Command::Status).await?;
        parse_status(&value).ok_or_else(|| Error::Control {
            step: Command::Status.step(),
            detail: format!("not understood: {value}"),
        })
    }

    /// Waits until a VM whose state is being loaded runs.
    pub(super) async fn loaded(&self) -> Result<(), Error> {
        let mut seen = self.client.seen();
        if self.status().await? == Status::Loading {
            // Asked after events flow, so that the one waited for cannot have been missed.
            let settled = async {
                let settled = seen.wait_for(|seen| seen.running == Some(true) || seen.closed);
                settled.await.is_ok_and(|seen| !seen.closed)
            };
            let step = "load the snapshot's state";
            match tokio::time::timeout(LOAD_LIMIT, settled).await {
                Ok(true) => {}
                Ok(false) => return Err(self.gone(step).await),
                Err(_) => {
                    let millis = LOAD_LIMIT.as_millis() as u64;
                    return Err(Error::Timeout { step, millis });
                }
            }
        }
        Ok(())
    }

    /// The error of a process that closed its control socket.
    async fn gone(&self, step: &'static str) -> Error {
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

    /// The error if the process is gone already.
    pub(super) async fn check(&self) -> Result<(), Error> {
        let gone = self.exit.borrow().is_some();
        if gone {
            Err(self.gone("use").await)
        } else {
            Ok(())
        }
    }

    /// Kills the process and waits until it is gone.
    pub(super) async fn kill(&self) -> Result<(), Error> {
        self.process.kill().map_err(|error| Error::Control {
            step: "kill",
            detail: forkd_host::chain(&error),
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
    pub(super) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(Exit::Unknown),
            // The watcher is gone: the runtime is being shut down.
            Err(_) => Exit::Unknown,
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed)
            && let Err(error) = self.process.kill()
        {
            tracing::error!(%error, "a QEMU process is left over");
        }
    }
}

/// Waits for the end of a process, and says how it ended as far as the guest is concerned.
async fn watch_end(
    process: &Process,
    pidfd: &AsyncFd<OwnedFd>,
    mut seen: watch::Receiver<Seen>,
) -> Exit {
    let Ok(exit) = child::ended(process, pidfd, &mut seen, |seen| seen.closed).await else {
        return Exit::Unknown;
    };
    let shutdown = seen.borrow().shutdown;
    match (exit, shutdown) {
        (Some(host::Exit::Signal(signal)), _) => Exit::Signal(signal),
        (Some(host::Exit::Code(code)), _) if code != 0 => Exit::Code(code),
        (_, Some(Shutdown::Reset)) => Exit::Reset,
        (Some(host::Exit::Code(_)), _) | (_, Some(Shutdown::PowerOff)) => Exit::Code(0),
        _ => Exit::Unknown,
    }
}

fn describe(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("status {code}"),
        Exit::Signal(7) => "signal 7: the disk that holds its memory may be full".to_owned(),
        Exit::Signal(9) => "signal 9: it was killed, perhaps for want of memory".to_owned(),
        Exit::Signal(31) => "signal 31: it made a system call that its jail forbids".to_owned(),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::Reset => "the guest reset its machine".to_owned(),
        Exit::Unknown => "nobody knows how".to_owned(),
    }
}
