//! Starting a process.
//!
//! All processes are started by one thread that lives as long as this process, because the kernel
//! sends the signal of a parent's death when the *thread* that forked ends, not the process.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{OnceLock, mpsc};
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{PidfdFlags, Signal};
use rustix::thread::LinkNameSpaceType;

use super::confine::{Confinement, OwnPids, Prepared};
use super::{Error, Process};
use crate::sys::{self, BeforeExec};

/// Where a standard stream of a new process leads.
#[derive(Debug)]
pub enum Stdio {
    /// Nowhere.
    Null,
    /// Into this file, pipe or socket.
    Fd(OwnedFd),
}

/// What to start, and how.
#[derive(Debug)]
pub struct Spawn {
    /// The program: a path, or a name looked up in `PATH`.
    pub program: OsString,
    /// Its arguments, without the program itself.
    pub args: Vec<OsString>,
    /// Working directory; this process's own if absent.
    pub cwd: Option<PathBuf>,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
    /// Files the process inherits, under the numbers they have here. All others are closed to it, as
    /// far as they were opened to be closed on exec, as std and rustix do.
    pub inherit: Vec<OwnedFd>,
    /// The kernel kills the process when this one ends, however it ends.
    pub die_with_parent: bool,
    /// A cgroup directory to start in.
    pub cgroup: Option<OwnedFd>,
    /// A network namespace to start in.
    pub netns: Option<OwnedFd>,
    /// How the process is confined. Then it has no environment either, and nothing of `netns` unless its
    /// confinement says so: a confined process with a root of its own has an empty network of its own.
    pub confine: Option<Confinement>,
}

impl Spawn {
    /// A program with arguments, silent, in a session of its own.
    pub fn new(program: impl Into<OsString>, args: Vec<OsString>) -> Spawn {
        Spawn {
            program: program.into(),
            args,
            cwd: None,
            stdout: Stdio::Null,
            stderr: Stdio::Null,
            inherit: Vec::new(),
            die_with_parent: false,
            cgroup: None,
            netns: None,
            confine: None,
        }
    }
}

type Job = (Spawn, mpsc::SyncSender<Result<Process, Error>>);

/// The thread that forks; `Err` if it could not be started.
fn spawner() -> Result<&'static mpsc::Sender<Job>, io::Error> {
    static SPAWNER: OnceLock<Result<mpsc::Sender<Job>, io::ErrorKind>> = OnceLock::new();
    let begin = || {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let work = move || {
            for (spawn, answer) in inbox {
                // Who asked may have gone; then nobody wants to know.
                let _ = answer.send(start_here(spawn));
            }
        };
        let builder = thread::Builder::new().name("forkd-spawner".to_owned());
        let started = builder.spawn(work);
        started.map(|_| jobs).map_err(|error| error.kind())
    };
    let spawner = SPAWNER.get_or_init(begin);
    spawner.as_ref().map_err(|kind| (*kind).into())
}

pub(super) fn start(spawn: Spawn) -> Result<Process, Error> {
    let program = spawn.program.to_string_lossy().into_owned();
    let failed = |source| Error::Spawn { program, source };
    let (answer, outcome) = mpsc::sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes has ended");
    match spawner() {
        Ok(jobs) => match jobs.send((spawn, answer)) {
            Ok(()) => outcome.recv().unwrap_or_else(|_| Err(failed(gone()))),
            Err(_) => Err(failed(gone())),
        },
        Err(source) => Err(failed(source)),
    }
}

fn start_here(spawn: Spawn) -> Result<Process, Error> {
    let program = spawn.program.to_string_lossy().into_owned();
    let failed = |source| Error::Spawn {
        program: program.clone(),
        source,
    };
    let this = || rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    let parent = spawn.die_with_parent.then(this).transpose();
    let parent = parent.map_err(|errno| failed(errno.into()))?;
    let confine = spawn.confine.map(Prepared::new).transpose();
    let confine = confine.map_err(failed)?;
    let own_pids = confine.as_ref().is_some_and(Prepared::own_pids);
    let confined = confine.is_some();
    let keeps_network = confine.as_ref().is_none_or(Prepared::keeps_network);
    let netns = spawn.netns.as_ref().filter(|_| keeps_network);
    let steps = Steps {
        inherit: spawn.inherit.iter().map(AsRawFd::as_raw_fd).collect(),
        parent,
        cgroup: spawn.cgroup.as_ref().map(AsRawFd::as_raw_fd),
        netns: netns.map(AsRawFd::as_raw_fd),
        confine,
    };
    let mut command = Command::new(&spawn.program);
    if confined {
        command.env_clear();
    }
    command.args(&spawn.args).stdin(std::process::Stdio::null());
    command.stdout(spawn.stdout).stderr(spawn.stderr);
    if let Some(cwd) = &spawn.cwd {
        command.current_dir(cwd);
    }
    sys::before_exec(&mut command, steps);
    let pids = own_pids.then(OwnPids::begin).transpose().map_err(failed)?;
    let child = command.spawn();
    if let Some(pids) = pids {
        // Left where they are born now, the next children could not be helped.
        pids.end().map_err(failed)?;
    }
    let mut child = child.map_err(failed)?;
    own(child.id()).inspect_err(|_| {
        // Nobody could ever name it again.
        let _ = child.kill();
        let _ = child.wait();
    })
}

/// Takes hold of a child that nobody has reaped yet: its pid is its own until then.
pub(super) fn own(pid: u32) -> Result<Process, Error> {
    let gone = || Error::Step {
        step: "open",
        pid,
        source: io::ErrorKind::NotFound.into(),
    };
    let pidfd = super::open(pid)?.ok_or_else(gone)?;
    let identity = super::identity_of(pid)?.ok_or_else(gone)?;
    Ok(Process { identity, pidfd })
}

impl From<Stdio> for std::process::Stdio {
    fn from(stdio: Stdio) -> Self {
        match stdio {
            Stdio::Null => std::process::Stdio::null(),
            Stdio::Fd(fd) => fd.into(),
        }
    }
}

/// What the child does before exec. Only raw system calls on values made before the fork.
struct Steps {
    /// Numbers, not owned files: the child is a copy and must not close anything twice.
    inherit: Vec<RawFd>,
    /// The process to die with, as a pidfd.
    parent: Option<OwnedFd>,
    cgroup: Option<RawFd>,
    netns: Option<RawFd>,
    confine: Option<Prepared>,
}

impl BeforeExec for Steps {
    fn run(&self) -> io::Result<()> {
        rustix::process::setsid()?;
        if let Some(cgroup) = self.cgroup {
            enter_cgroup(sys::borrow_in_child(cgroup))?;
        }
        if let Some(netns) = self.netns {
            let netns = sys::borrow_in_child(netns);
            let kind = LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(netns, Some(kind))?;
        }
        if let Some(confine) = &self.confine {
            confine.enter()?;
        }
        // Asked after the user is the last one: changing it makes the kernel forget.
        if let Some(parent) = &self.parent {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // It may have died before the kernel was asked.
            let mut ended = [PollFd::new(parent, PollFlags::IN)];
            if rustix::event::poll(&mut ended, Some(&Timespec::default()))? != 0 {
                return Err(rustix::io::Errno::SRCH.into());
            }
        }
        for fd in &self.inherit {
            rustix::io::fcntl_setfd(sys::borrow_in_child(*fd), FdFlags::empty())?;
        }
        match &self.confine {
            Some(confine) => confine.filter(),
            None => Ok(()),
        }
    }
}

fn enter_cgroup(directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let procs = rustix::fs::openat(directory, c"cgroup.procs", flags, Mode::empty())?;
    // 0 is the writer itself.
    rustix::io::write(procs, b"0").map(|_| ())
}
