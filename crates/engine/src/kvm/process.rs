//! A process of the monitor: a VM or a template, held, asked, watched until it is gone.

use std::io::PipeReader;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forkd_host::process::{self as host, Process, Spawn, Stdio};
use forkd_wire::vmm::{self, Reply, Request};

use super::client::{self, Client, Ready, Seen};
use crate::child::{Guard, Watched};
use crate::output::Output;
use crate::rundir::failed;
use crate::{Error, Exit, blocking};
use forkd_host::chain;

/// What happens to a process when nobody holds on to it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Its control socket stays open as long as this program runs; it ends with this program.
    Tied,
    /// Its control socket is closed: another daemon may open another.
    Free,
}

/// A process that somebody holds on to.
#[derive(Debug)]
pub(super) struct Monitor {
    /// The process itself.
    pub(super) process: Watched,
    client: Arc<Client>,
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
        let pid = guard.process().identity().pid;
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let client = Arc::new(Client::new(control).map_err(failed("watch", &proc))?);
        let tied = (hold == Hold::Tied).then(|| Arc::clone(&client));
        let meaning = move |exit, seen: &Seen| {
            drop(tied);
            if let Some((vmm::Exit::Internal, message)) = &seen.exiting {
                tracing::warn!(message, "the monitor gave up a VM");
            }
            judge(exit, seen.exiting.as_ref().map(|(exit, _)| *exit))
        };
        let seen = client.seen();
        let process = Watched::attach(guard.disarm(), output, seen, |seen| seen.closed, meaning)?;
        Ok(Monitor { process, client })
    }

    /// The kernel's list of the process's pages.
    pub(super) fn pagemap(&self) -> PathBuf {
        format!("/proc/{}/pagemap", self.process.identity().pid).into()
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
            Err(client::Error::Closed) => Err(self.process.gone(step).await),
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
            (None, None) => Err(Start::Error(self.process.gone(step).await)),
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
            (false, None) => Err(self.process.gone(step).await),
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
}

/// Why a template is not there.
#[derive(Debug)]
pub(super) enum Start {
    /// It says why itself.
    Failed(vmm::Failure),
    /// It says nothing.
    Error(Error),
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
