//! Starting QEMU: what it inherits, where its sockets are, how it is confined.

use std::fs::File;
use std::io::PipeReader;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_host::process::{Process, Spawn, Stdio, User};
use tokio::net::UnixStream;

use super::arguments::{Launch, Sockets, Start, arguments, inherited};
use super::names::{AGENT, CONSOLE, CONSOLE_LOG, CONTROL};
use super::process::Monitor;
use super::request::Command;
use super::{Setup, missing};
use crate::child::{self, Guard};
use crate::jail::Walls;
use crate::output::Output;
use crate::rundir::{RunDir, failed};
use crate::statefile::DEVICES_MAX;
use crate::{Error, Lifetime, MachineSpec, SlotHandles, blocking, console};

/// A process to start.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) setup: Arc<Setup>,
    pub(super) walls: Walls,
    /// Whom it runs as; as this process does if absent.
    pub(super) user: Option<User>,
    pub(super) id: String,
    pub(super) run_dir: PathBuf,
    pub(super) machine: MachineSpec,
    /// RAM, for QEMU to open once more.
    pub(super) ram: File,
    pub(super) first: First,
    pub(super) lifetime: Lifetime,
    pub(super) slot: SlotHandles,
}

/// What it does first.
#[derive(Debug)]
pub(super) enum First {
    /// Boot, with this rate of the time-stamp counter.
    Boot(Option<u64>),
    /// Load device state from this file, from where it stands.
    Load(File),
}

/// Starts a process; answers when it has greeted.
pub(super) async fn start(plan: Plan) -> Result<(RunDir, Monitor), Error> {
    let started = blocking::run(move || spawn(plan)).await?;
    let Started {
        run_dir,
        guard,
        control,
        console: console_socket,
        stderr,
        names,
    } = started;
    let output = Output::follow(stderr);
    let log = run_dir.file(CONSOLE_LOG);
    tokio::spawn(console::pump(console_socket, log));
    let monitor = Monitor::attach(guard.disarm(), control, output)?;
    let greeted = monitor.command(Command::Capabilities).await;
    greeted.map_err(|error| name_files(error, &names))?;
    Ok((run_dir, monitor))
}

struct Started {
    run_dir: RunDir,
    guard: Guard,
    control: UnixStream,
    console: UnixStream,
    stderr: PipeReader,
    names: Vec<(RawFd, PathBuf)>,
}

/// Sockets are there, and connected to, before the process: nothing has to be waited or polled for.
fn spawn(plan: Plan) -> Result<Started, Error> {
    let run_dir = RunDir::open(&plan.run_dir)?;
    let listeners = [CONTROL, AGENT, CONSOLE].map(|name| run_dir.listen(name));
    let [control, agent, console] = listeners;
    let (control, agent, console) = (control?, agent?, console?);
    let connect = |name| {
        let stream = run_dir.connect(name);
        stream.map_err(failed("connect to", &run_dir.file(name)))
    };
    let streams = (connect(CONTROL)?, connect(CONSOLE)?);
    let sockets = Sockets {
        control: control.as_raw_fd(),
        agent: agent.as_raw_fd(),
        console: console.as_raw_fd(),
    };
    let mut files = Files {
        inherited: vec![control.into(), agent.into(), console.into()],
        names: Vec::new(),
    };
    let tap = match plan.slot.tap {
        None if plan.machine.network => plan.setup.nowhere.tap(),
        tap => tap,
    };
    let launch = Launch {
        id: &plan.id,
        machine: &plan.machine,
        accel: plan.setup.accel,
        ram: files.add(plan.ram),
        disk: files.open(&plan.machine.rootfs)?,
        start: match plan.first {
            First::Boot(tsc_khz) => Start::Boot {
                tsc_khz,
                kernel: files.copy("open the kernel", &plan.machine.kernel)?,
                initramfs: files.copy("open the initramfs", &plan.machine.initramfs)?,
            },
            First::Load(file) => Start::Load {
                state: files.add(file),
            },
        },
        sockets,
        tap: tap.map(|tap| files.add(tap)),
        sandbox: plan.walls.filtered(),
    };
    let args = arguments(&launch);
    let program = plan.walls.program();
    let (stderr, writer) = std::io::pipe().map_err(failed("pipe the output of", program))?;
    let process = Process::spawn(Spawn {
        stderr: Stdio::Fd(writer.into()),
        inherit: files.inherited,
        die_with_parent: plan.lifetime == Lifetime::DieWithParent,
        cgroup: plan.slot.cgroup,
        netns: plan.slot.netns,
        confine: plan.walls.confinement(plan.user, DEVICES_MAX),
        ..Spawn::new(program, args)
    });
    let guard = Guard::new(process.map_err(|error| child::not_started(program, error, missing))?);
    Ok(Started {
        run_dir,
        guard,
        control: streams.0,
        console: streams.1,
        stderr,
        names: files.names,
    })
}

/// Files that QEMU inherits, and the names of some.
struct Files {
    inherited: Vec<OwnedFd>,
    names: Vec<(RawFd, PathBuf)>,
}

impl Files {
    /// Adds a file. Answers its number.
    fn add(&mut self, file: impl Into<OwnedFd>) -> RawFd {
        let file = file.into();
        let number = file.as_raw_fd();
        self.inherited.push(file);
        number
    }

    fn open(&mut self, path: &Path) -> Result<RawFd, Error> {
        let opened = File::open(path).map(|file| self.add(file));
        opened.map_err(failed("open the rootfs", path))
    }

    /// Adds a copy in memory, which every user may read.
    fn copy(&mut self, step: &'static str, path: &Path) -> Result<RawFd, Error> {
        let copy = || -> std::io::Result<File> {
            let mut from = File::open(path)?;
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            let mut copy = File::from(rustix::fs::memfd_create("forkd-boot", flags)?);
            std::io::copy(&mut from, &mut copy)?;
            Ok(copy)
        };
        let number = self.add(copy().map_err(failed(step, path))?);
        self.names.push((number, path.to_owned()));
        Ok(number)
    }
}

/// Gives files that QEMU complains of their names: it knows but numbers.
pub(super) fn name_files(error: Error, names: &[(RawFd, PathBuf)]) -> Error {
    let Error::Exited { exit, mut output } = error else {
        return error;
    };
    for (number, path) in names {
        // QEMU puts names in quotes.
        let quoted = format!("{}'", inherited(*number));
        output = output.replace(&quoted, &format!("{}'", path.display()));
    }
    Error::Exited { exit, output }
}
