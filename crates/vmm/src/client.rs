//! The controller's side of the protocol, blocking: for tests, the benchmark and the lab.
//!
//! Every process it knows is a child of this one (the monitor forks siblings), so dropping a
//! [`Process`] kills and reaps it.

mod fork;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkd_wire::vmm::{Failure, Reply, Request, Stages};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};

use crate::control::{self, Channel};

/// Held while a child's descriptor is open to every child: others started meanwhile must not get it.
static STARTING: Mutex<()> = Mutex::new(());

/// How long to wait for an answer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Why something did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket failed.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A file, a socket pair or a wait failed.
    #[error("cannot {step}")]
    System {
        /// The step.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process is gone.
    #[error("process {0} of the monitor is gone")]
    Gone(u32),
    /// No answer.
    #[error("process {0} of the monitor does not answer")]
    Silent(u32),
    /// It answered with an error.
    #[error("the monitor refused: {}", .0.message)]
    Refused(Failure),
    /// It answered something else.
    #[error("unexpected answer of the monitor: {0:?}")]
    Unexpected(Box<Reply>),
}

fn system(step: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
    move |e| Error::System {
        step,
        source: e.into(),
    }
}

/// A template or sandbox.
#[derive(Debug)]
pub struct Process {
    channel: Channel,
    pid: u32,
    pidfd: OwnedFd,
    seq: u32,
    reaped: bool,
}

/// What a branch answered.
#[derive(Debug)]
pub struct Branched {
    /// The new template.
    pub template: Process,
    /// How long the guest stood still.
    pub pause_us: u32,
    /// Until all vCPUs stood still, reading out the state, forking.
    pub stages_us: [u32; 3],
    /// What a written layer is relative to.
    pub base: String,
}

/// The files of a written snapshot.
#[derive(Debug, Clone)]
pub struct SnapshotFiles {
    /// Memory pages.
    pub memory: PathBuf,
    /// Which pages.
    pub index: PathBuf,
    /// The machine.
    pub state: PathBuf,
}

impl SnapshotFiles {
    /// The usual names in `directory`.
    pub fn in_directory(directory: &Path) -> SnapshotFiles {
        let [memory, index, state] =
            ["memory.bin", "memory.index", "state.bin"].map(|name| directory.join(name));
        SnapshotFiles {
            memory,
            index,
            state,
        }
    }

    /// The command-line argument that names this layer.
    pub fn layer_argument(&self) -> String {
        format!("{},{}", self.memory.display(), self.index.display())
    }
}

impl Process {
    /// Starts `program` with `arguments` and a control socket.
    pub fn start(program: &Path, arguments: &[String]) -> Result<Process, Error> {
        let pair = |source| Error::System {
            step: "make a socket pair",
            source,
        };
        let (ours, theirs) = Channel::pair().map_err(pair)?;
        let theirs = theirs.into_fd();
        let starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        // The child needs the descriptor across exec; this process closes its copy right after.
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())
            .map_err(system("pass on a socket"))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .arg(format!("--control-fd={}", theirs.as_raw_fd()));
        let failed = |source| Error::Start {
            program: program.to_owned(),
            source,
        };
        let child = command.spawn().map_err(failed)?;
        drop((theirs, starting));
        let pid = child.id();
        let handle = Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(handle, PidfdFlags::empty());
        let pidfd = pidfd.map_err(system("refer to a process"))?;
        Ok(Process {
            channel: ours,
            pid,
            pidfd,
            seq: 0,
            reaped: false,
        })
    }

    /// Starts a template of a snapshot on disk and waits until it is ready.
    pub fn template(
        program: &Path,
        id: &str,
        layers: &[SnapshotFiles],
        more: &[&str],
    ) -> Result<Process, Error> {
        let state = layers
            .last()
            .map(|top| top.state.display().to_string())
            .unwrap_or_default();
        let mut arguments = vec![
            "template".into(),
            format!("--id={id}"),
            format!("--state={state}"),
        ];
        arguments.extend(
            layers
                .iter()
                .map(|layer| format!("--layer={}", layer.layer_argument())),
        );
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let mut template = Process::start(program, &arguments)?;
        match template.next()? {
            (_, Reply::Ready { .. }, _) => Ok(template),
            (_, Reply::Failed(failure), _) => Err(Error::Refused(failure)),
            (_, other, _) => Err(Error::Unexpected(Box::new(other))),
        }
    }

    /// Boots the test guest and waits until it runs.
    pub fn boot_test_guest(
        program: &Path,
        memory_mib: u32,
        more: &[&str],
    ) -> Result<Process, Error> {
        let mut arguments: Vec<String> = vec![
            "boot".into(),
            "--test-guest".into(),
            format!("--memory={memory_mib}"),
        ];
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let mut sandbox = Process::start(program, &arguments)?;
        // The guest's first word may overtake the monitor's.
        sandbox.alive()?;
        Ok(sandbox)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The socket to it.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Asks; answers the sequence number.
    pub fn send(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<u32, Error> {
        self.seq += 1;
        self.channel.request(self.seq, request, fds)?;
        Ok(self.seq)
    }

    /// The next thing it says.
    #[expect(clippy::should_implement_trait, reason = "it fails, and waits")]
    pub fn next(&mut self) -> Result<(u32, Reply, Vec<OwnedFd>), Error> {
        let deadline = Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&deadline)) {
            Ok(0) => Err(Error::Silent(self.pid)),
            _ => self.channel.next_reply()?.ok_or(Error::Gone(self.pid)),
        }
    }

    /// Waits for the answer to `seq`; events are dropped.
    pub fn answer(&mut self, seq: u32) -> Result<(Reply, Vec<OwnedFd>), Error> {
        loop {
            match self.next()? {
                (found, Reply::Error(failure), _) if found == seq => {
                    return Err(Error::Refused(failure));
                }
                (found, reply, fds) if found == seq => return Ok((reply, fds)),
                _ => {}
            }
        }
    }

    /// Asks and waits for the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
        let seq = self.send(request, &[])?;
        Ok(self.answer(seq)?.0)
    }

    /// Waits until a new sandbox says that it runs.
    pub fn running(&mut self) -> Result<Stages, Error> {
        loop {
            match self.next()?.1 {
                Reply::Running(stages) => return Ok(stages),
                Reply::Failed(failure) => return Err(Error::Refused(failure)),
                Reply::Report(_) => {}
                other => return Err(Error::Unexpected(Box::new(other))),
            }
        }
    }

    /// Waits until the test guest reports a value.
    pub fn report(&mut self) -> Result<u64, Error> {
        loop {
            match self.next()?.1 {
                Reply::Report(value) => return Ok(value),
                Reply::Failed(failure) | Reply::Error(failure) => {
                    return Err(Error::Refused(failure));
                }
                other @ Reply::Exiting { .. } => return Err(Error::Unexpected(Box::new(other))),
                _ => {}
            }
        }
    }

    /// Waits until the test guest has executed something.
    pub fn alive(&mut self) -> Result<(), Error> {
        while self.report()? != crate::guest::ALIVE {}
        Ok(())
    }

    /// Waits until the test guest has executed something and the monitor has said where the time
    /// went, if it says so (the benchmark's floor does not).
    pub fn alive_with_stages(&mut self) -> Result<Option<Stages>, Error> {
        let mut stages = None;
        loop {
            match self.next()?.1 {
                Reply::Running(told) => stages = Some(told),
                Reply::Report(crate::guest::ALIVE) => return Ok(stages),
                Reply::Failed(failure) => return Err(Error::Refused(failure)),
                other => return Err(Error::Unexpected(Box::new(other))),
            }
        }
    }

    /// Gives the test guest a command.
    pub fn command(&mut self, op: u32, args: [u32; 3]) -> Result<(), Error> {
        self.send(&Request::Guest { op, args }, &[]).map(drop)
    }

    /// Gives the test guest a command and waits for its report.
    pub fn run(&mut self, op: u32, args: [u32; 3]) -> Result<u64, Error> {
        self.command(op, args)?;
        self.report()
    }

    /// Branches a sandbox.
    pub fn branch(&mut self) -> Result<Branched, Error> {
        let pair = |source| Error::System {
            step: "make a socket pair",
            source,
        };
        let (ours, theirs) = Channel::pair().map_err(pair)?;
        let request = Request::Branch { stay_paused: false };
        let seq = self.send(&request, &[theirs.as_fd()])?;
        let (reply, mut pidfds) = self.answer(seq)?;
        match (reply, pidfds.pop()) {
            (
                Reply::Branched {
                    pid,
                    pause_us,
                    quiesce_us,
                    state_us,
                    fork_us,
                    base,
                },
                Some(pidfd),
            ) => {
                let template = Process {
                    channel: ours,
                    pid,
                    pidfd,
                    seq: 0,
                    reaped: false,
                };
                let stages_us = [quiesce_us, state_us, fork_us];
                Ok(Branched {
                    template,
                    pause_us,
                    stages_us,
                    base,
                })
            }
            (other, _) => Err(Error::Unexpected(Box::new(other))),
        }
    }

    /// Has a template born of a branch (or a paused sandbox, with `Save`) written to `directory`.
    pub fn write(
        &mut self,
        request: &Request,
        directory: &Path,
    ) -> Result<(SnapshotFiles, Reply), Error> {
        let files = SnapshotFiles::in_directory(directory);
        let seq = self.start_write(request, &files)?;
        let (reply, _) = self.answer(seq)?;
        Ok((files, reply))
    }

    /// Asks for a write without waiting; answers the sequence number.
    pub fn start_write(&mut self, request: &Request, files: &SnapshotFiles) -> Result<u32, Error> {
        let failed = |source| Error::System {
            step: "create the snapshot's files",
            source,
        };
        let create = |path: &PathBuf| File::create(path).map_err(failed);
        let (memory, index, state) = (
            create(&files.memory)?,
            create(&files.index)?,
            create(&files.state)?,
        );
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid)).map_err(failed)?;
        self.send(
            request,
            &[
                memory.as_fd(),
                index.as_fd(),
                state.as_fd(),
                pagemap.as_fd(),
            ],
        )
    }

    /// Kills the process; it is reaped when it is dropped or waited for.
    pub fn kill(&self) {
        // A process that has ended already needs no killing.
        _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<Option<WaitIdStatus>, Error> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            let tick = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            if matches!(rustix::event::poll(&mut fds, Some(&tick)), Ok(1)) {
                self.reaped = true;
                return rustix::process::waitid(
                    WaitId::PidFd(self.pidfd.as_fd()),
                    WaitIdOptions::EXITED,
                )
                .map_err(system("wait for a process"));
            }
        }
        Err(Error::Silent(self.pid))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            _ = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
        }
    }
}
