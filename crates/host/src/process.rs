//! Processes that are owned: started in a session of their own, watched and killed through a pidfd, and
//! found again after a restart by pid *and* start time, so that a reused pid is never mistaken.
//!
//! ```text
//!   spawn ──► Process ──kill──► wait ──► Exit
//!   adopt ──►    └ pidfd: becomes readable when the process ends, for whoever polls
//! ```
//!
//! Dropping a [`Process`] neither kills nor reaps it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

mod confine;
mod filter;
pub mod root;
mod spawn;
mod stat;

pub use confine::{Confinement, User};
pub use spawn::{Spawn, Stdio};
pub use stat::{Memory, by_user, command_line, identity_of, memory};

/// What failed, and on which process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A step on a process failed.
    #[error("cannot {step} process {pid}")]
    Step {
        /// The step, such as `signal` or `wait for`.
        step: &'static str,
        /// The process.
        pid: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file of `/proc` was not as expected.
    #[error("cannot understand /proc/{pid}/{file}")]
    Proc {
        /// The process.
        pid: u32,
        /// The file in its directory.
        file: &'static str,
    },
}

impl Error {
    /// The operating system's error beneath, if there is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Error::Spawn { source, .. } | Error::Step { source, .. } => Some(source),
            Error::Proc { .. } => None,
        }
    }
}

/// A process, told apart from every other since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It left with a status.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It is gone and was not our child, or somebody else has reaped it.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "status {code}"),
            Exit::Signal(signal) => write!(f, "signal {signal}"),
            Exit::Unknown => f.write_str("cause unknown"),
        }
    }
}

/// A process that runs, or has ended and may still have to be reaped.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    pidfd: OwnedFd,
}

impl Process {
    /// Starts a program.
    pub fn spawn(spawn: Spawn) -> Result<Process, Error> {
        spawn::start(spawn)
    }

    /// Takes hold of a child that another program forked for this process (`CLONE_PARENT`), and that
    /// nobody has reaped. One that has ended already can still be waited for.
    pub fn of_child(pid: u32) -> Result<Process, Error> {
        spawn::own(pid)
    }

    /// Finds a process again. `None`: it is gone, or its pid has gone to another.
    pub fn adopt(identity: Identity) -> Result<Option<Process>, Error> {
        let Some(pidfd) = open(identity.pid)? else {
            return Ok(None);
        };
        // Asked after the pidfd is open: from here on the pid cannot be reused unnoticed.
        match stat::status_of(identity.pid)? {
            Some(status) if status.start_ticks == identity.start_ticks && !status.ended => {
                Ok(Some(Process { identity, pidfd }))
            }
            _ => Ok(None),
        }
    }

    /// Pid and start time.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// A file descriptor that becomes readable when the process ends. For polling only.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills the process at once. One that has ended already is fine.
    pub fn kill(&self) -> Result<(), Error> {
        self.signal(Signal::KILL)
    }

    /// Sends a signal. A process that has ended already is fine.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(self.failed("signal", errno)),
        }
    }

    /// Says how the process ended, and reaps it if it is our child. `None`: it still runs. Answers only
    /// once: a second call finds nothing left to reap and says [`Exit::Unknown`].
    pub fn try_wait(&self) -> Result<Option<Exit>, Error> {
        self.wait_until(Timespec::default())
    }

    /// As [`Process::try_wait`], but waits up to this long.
    pub fn wait_for(&self, limit: std::time::Duration) -> Result<Option<Exit>, Error> {
        self.wait_until(Timespec {
            tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        })
    }

    fn wait_until(&self, limit: Timespec) -> Result<Option<Exit>, Error> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => Ok(None),
            Ok(_) => self.reap().map(Some),
            Err(errno) => Err(self.failed("poll", errno)),
        }
    }

    fn reap(&self) -> Result<Exit, Error> {
        let id = WaitId::PidFd(self.pidfd.as_fd());
        match rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => Ok(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            }),
            Ok(None) | Err(Errno::CHILD) => Ok(Exit::Unknown),
            Err(errno) => Err(self.failed("wait for", errno)),
        }
    }

    /// Tells the kernel how gladly it may kill the process when memory runs out: -1000 never, 1000 first.
    pub fn set_oom_score_adj(&self, score: i16) -> Result<(), Error> {
        let path = format!("/proc/{}/oom_score_adj", self.identity.pid);
        std::fs::write(path, score.to_string()).map_err(|source| Error::Step {
            step: "set the out-of-memory score of",
            pid: self.identity.pid,
            source,
        })
    }

    /// Memory the process uses now.
    pub fn memory(&self) -> Result<Memory, Error> {
        stat::memory(self.identity.pid)
    }

    fn failed(&self, step: &'static str, errno: Errno) -> Error {
        Error::Step {
            step,
            pid: self.identity.pid,
            source: errno.into(),
        }
    }
}

/// Opens a pidfd. `None`: there is no such process.
fn open(pid: u32) -> Result<Option<OwnedFd>, Error> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Some(raw) = raw else {
        return Ok(None);
    };
    // NONBLOCK, so that reaping never waits.
    match rustix::process::pidfd_open(raw, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(Errno::SRCH) => Ok(None),
        Err(errno) => Err(Error::Step {
            step: "open",
            pid,
            source: errno.into(),
        }),
    }
}

#[cfg(test)]
mod tests;
