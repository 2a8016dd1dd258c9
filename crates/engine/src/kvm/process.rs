//! A process of the monitor: a VM or a template, held, asked, watched until it is gone.

use std::io::PipeReader;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkd_host::process::{self as host, Process, Spawn, Stdio};
use forkd_wire::vmm::{self, Reply, Request};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::client::{self, Client, Ready, Seen};
use crate::child::{self, Guard, KILL_LIMIT, LAST_WORDS, OOM_SCORE};
use crate::output::Output;
use crate::rundir::failed;
use crate::{Error, Exit, ProcessIdentity, blocking};
use forkd_host::chain;

/// What happens to a process when nobody holds on to it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Its control socket stays open as long as this program runs; it ends with this program.
    Tied,
    /// Its control socket is closed: another daemon may open another.
    Free,
}

/// A process that somebody holds on to. Until [`Monitor::keep`] is called, letting go kills it.
#[derive(Debug)]
pub(super) struct Monitor {
    process: Arc<Process>,
    client: Arc<Client>,
    output: Arc<Output>,
    exit: watch::Receiver<Option<Exit>>,
    kept: AtomicBool,
}

/// A process that was started and has not spoken yet.
#[derive(Debug)]
pub(super) struct Launch {
    /// The program.
    pub(super) program: PathBuf,
    /// Its arguments, which name `theirs` and `inherit` by number.
    pub(super) args: Vec<std::ffi::OsString>,
    /// This end of the control socket.
    pub(super) ours: OwnedFd,
    /// What it inherits, its own end of the control socket among it.
    pub(super) inherit: Vec<OwnedFd>,
    /// Whether the kernel kills it when this program ends.
    pub(super) die_with_parent: bool,
    /// The cgroup it starts in.
    pub(super) cgroup: Option<OwnedFd>,
}

/// Starts a process.
pub(super) async fn start(launch: Launch) -> Result<Monitor, Error> {
    let hold = match launch.die_with_parent {
        true => Hold::Tied,
        false => Hold::Free,
    };
    let (guard, ours, stderr) = blocking::run(move || spawn(launch)).await?;
    let output = Output::follow(stderr);
    Monitor::attach(guard.disarm(), ours, output, hold)
}

fn spawn(launch: Launch) -> Result<(Guard, OwnedFd, PipeReader), Error> {
    let (stderr, writer) =
        std::io::pipe().map_err(failed("pipe the output of", &launch.program))?;
    let process = Process::spawn(Spawn {
        stderr: Stdio::Fd(writer.into()),
        inherit: launch.inherit,
        die_with_parent: launch.die_with_parent,
        cgroup: launch.cgroup,
        ..Spawn::new(&launch.program, launch.args)
    });
    let process = process.map_err(|error| Error::Spawn {
        program: launch.program.display().to_string(),
        source: match error {
            host::Error::Spawn { source, .. } => source,
            other => std::io::Error::other(other),
        },
    })?;
    Ok((Guard::new(process), launch.ours, stderr))
}

/// Takes hold of a process that the monitor forked for this one. One that has ended is reaped.
pub(super) fn own(pid: u32) -> Result<Process, Error> {
    Process::of_child(pid).map_err(|error| Error::Control {
        step: "find a new process",
        detail: chain(&error),
    })
}

/// Moves a process into this one's control group. A branch is born in that of its sandbox, and would end
/// with it. Blocks.
pub(super) fn join_own_group(pid: u32) {
    let Some(mount) = forkd_host::facts::Facts::collect().cgroup.v2 else {
        return;
    };
    let own = group_of("self");
    if own.is_none() || own == group_of(&pid.to_string()) {
        return;
    }
    let own = own.unwrap_or_default();
    let procs = mount.join(own.trim_start_matches('/')).join("cgroup.procs");
    if let Err(error) = std::fs::write(&procs, pid.to_string()) {
        let path = procs.display();
        tracing::warn!(%error, %path, pid, "a branch stays in its sandbox's control group");
    }
}

/// The control group of a process, in version 2.
fn group_of(process: &str) -> Option<String> {
    let groups = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(own.to_owned())
}

impl Monitor {
    /// Takes a process and this end of its control socket.
    pub(super) fn attach(
        process: Process,
        control: OwnedFd,
        output: Arc<Output>,
        hold: Hold,
    ) -> Result<Monitor, Error> {
        let guard = Guard::new(process);
        let process = guard.process();
        let pid = process.identity().pid;
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let client = Arc::new(Client::new(control).map_err(failed("watch", &proc))?);
        if let Err(error) = process.set_oom_score_adj(OOM_SCORE) {
            tracing::debug!(%error, "out-of-memory score stays as it is");
        }
        let pidfd = process.pidfd().try_clone_to_owned();
        let pidfd = pidfd.and_then(crate::fd::readable);
        let pidfd = pidfd.map_err(failed("watch", &proc))?;
        let process = Arc::new(guard.disarm());
        let (tell, exit) = watch::channel(None);
        let watched = Arc::clone(&process);
        let seen = client.seen();
        let tied = (hold == Hold::Tied).then(|| Arc::clone(&client));
        tokio::spawn(async move {
            let exit = watch_end(&watched, &pidfd, seen).await;
            tracing::debug!(pid, ?exit, "a process of the monitor ended");
            tell.send_replace(Some(exit));
            drop(tied);
        });
        Ok(Monitor {
            process,
            client,
            output,
            exit,
            kept: AtomicBool::new(false),
        })
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

    /// The kernel's list of the process's pages.
    pub(super) fn pagemap(&self) -> PathBuf {
        format!("/proc/{}/pagemap", self.identity().pid).into()
    }

    /// Whether the process runs, as far as is known.
    pub(super) fn alive(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// Asks and waits. A process that is gone is told with its last words.
    pub(super) async fn ask(
        &self,
        step: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Reply, Error> {
        match self.client.ask(request, fds, limit).await {
            Ok(reply) => Ok(reply),
            Err(client::Error::Refused(failure)) => Err(Error::Control {
                step,
                detail: failure.message,
            }),
            Err(client::Error::Late) => Err(late(step, limit)),
            Err(client::Error::Closed) => Err(self.gone(step).await),
        }
    }

    /// The control socket, for exchanges of more than one message.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Closes this end of the control socket, as the end of this program does.
    #[cfg(test)]
    pub(super) fn hang_up(&self) {
        self.client.hang_up();
    }

    /// Waits until a template can be forked.
    pub(super) async fn ready(&self, step: &'static str, limit: Duration) -> Result<Ready, Start> {
        let seen = self.told(limit, |seen| seen.ready.is_some()).await;
        let seen = seen.ok_or_else(|| Start::Error(late(step, limit)))?;
        match (seen.ready, seen.failed) {
            (Some(ready), _) => Ok(ready),
            (None, Some(failure)) => Err(Start::Failed(failure)),
            (None, None) => Err(Start::Error(self.gone(step).await)),
        }
    }

    /// Waits until a VM runs, or waits to be resumed.
    pub(super) async fn running(&self, step: &'static str, limit: Duration) -> Result<(), Error> {
        let seen = self.told(limit, |seen| seen.running).await;
        let seen = seen.ok_or_else(|| late(step, limit))?;
        match (seen.running, seen.failed) {
            (true, _) => Ok(()),
            (false, Some(vmm::Failure { message, .. })) => Err(Error::Control {
                step,
                detail: message,
            }),
            (false, None) => Err(self.gone(step).await),
        }
    }

    /// Waits for word, for failure, or for the end; `None` when that takes too long.
    async fn told(&self, limit: Duration, wanted: impl Fn(&Seen) -> bool) -> Option<Seen> {
        let mut seen = self.client.seen();
        let told = seen.wait_for(|seen| wanted(seen) || seen.failed.is_some() || seen.closed);
        match tokio::time::timeout(limit, told).await {
            Ok(Ok(seen)) => Some(seen.clone()),
            // The reader is gone with all it knew.
            Ok(Err(_)) => Some(Seen::default()),
            Err(_) => None,
        }
    }

    /// The error of a process that closed its control socket.
    pub(super) async fn gone(&self, step: &'static str) -> Error {
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
        match self.alive() {
            true => Ok(()),
            false => Err(self.gone("use").await),
        }
    }

    /// Kills the process and waits until it is gone.
    pub(super) async fn kill(&self) -> Result<(), Error> {
        self.process.kill().map_err(|error| Error::Control {
            step: "kill",
            detail: chain(&error),
        })?;
        match tokio::time::timeout(KILL_LIMIT, self.exited()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(late("end when killed", KILL_LIMIT)),
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

/// Why a template is not there.
#[derive(Debug)]
pub(super) enum Start {
    /// It says why itself.
    Failed(vmm::Failure),
    /// It says nothing.
    Error(Error),
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed)
            && let Err(error) = self.process.kill()
        {
            tracing::error!(%error, "a process of the monitor is left over");
        }
    }
}

fn late(step: &'static str, limit: Duration) -> Error {
    Error::Timeout {
        step,
        millis: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
    }
}

/// An answer that belongs to no such request.
pub(super) fn strange(step: &'static str, reply: &Reply) -> Error {
    Error::Control {
        step,
        detail: format!("not understood: {reply:?}"),
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
    let exiting = seen.borrow().exiting.clone();
    if let Some((vmm::Exit::Internal, message)) = &exiting {
        tracing::warn!(message, "the monitor gave up a VM");
    }
    judge(exit, exiting.map(|(exit, _)| exit))
}

/// What the end of a process means for its guest.
pub(super) fn judge(exit: Option<host::Exit>, told: Option<vmm::Exit>) -> Exit {
    match (exit, told) {
        (Some(host::Exit::Signal(signal)), _) => Exit::Signal(signal),
        (Some(host::Exit::Code(code)), _) if code != 0 => Exit::Code(code),
        (_, Some(vmm::Exit::Reset | vmm::Exit::Crash)) => Exit::Reset,
        (_, Some(vmm::Exit::Internal)) => Exit::Code(1),
        (Some(host::Exit::Code(_)), _) | (_, Some(vmm::Exit::PowerOff | vmm::Exit::Stopped)) => {
            Exit::Code(0)
        }
        _ => Exit::Unknown,
    }
}

fn describe(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("status {code}"),
        Exit::Signal(7) => "signal 7: the disk that holds its memory may be damaged".to_owned(),
        Exit::Signal(9) => "signal 9: it was killed, perhaps for want of memory".to_owned(),
        Exit::Signal(31) => "signal 31: it made a system call that the filter forbids".to_owned(),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::Reset => "the guest reset its machine".to_owned(),
        Exit::Unknown => "nobody knows how".to_owned(),
    }
}

/// The number under which a process inherits this descriptor.
pub(super) fn number(fd: &OwnedFd) -> std::os::fd::RawFd {
    fd.as_raw_fd()
}

/// Whether a process runs the monitor's program, also one that was replaced since.
pub(super) fn runs_monitor(pid: u32) -> bool {
    let Ok(exe) = std::fs::read_link(format!("/proc/{pid}/exe")) else {
        return false;
    };
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
    Path::new(name) == Path::new(super::program::PROGRAM)
}
