//! Starts programs.
//!
//! A plain root process takes the C library's `posix_spawn`, which does not copy page tables; that
//! is why its working directory is set by changing the agent's own for a moment. Another user, or a
//! terminal, takes `fork`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use forkd_wire::agent::connect::Code;
use forkd_wire::agent::process::PtySize;
use rustix::fs::{Mode, OFlags};

use crate::agent::find_program;
use crate::rpc::Fault;
use crate::sys;
use crate::users::User;

/// What to start.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) command: &'a str,
    pub(crate) args: &'a [String],
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) cwd: PathBuf,
    pub(crate) user: &'a User,
}

/// How its standard streams are connected.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Streams {
    /// Pipes for output; a pipe for input, or nothing.
    Pipes { stdin: bool },
    /// A terminal of this size.
    Terminal(PtySize),
}

/// A child that runs, and our ends of its streams.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: u32,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) terminal: Option<OwnedFd>,
}

/// Starts the program as the leader of its own process group.
pub(crate) fn spawn(plan: Plan<'_>, streams: Streams) -> Result<Spawned, Fault> {
    if !plan.cwd.is_dir() {
        return Err(Fault::new(
            Code::NotFound,
            format!(
                "the working directory {} does not exist",
                plan.cwd.display()
            ),
        ));
    }
    let program = find_program(plan.command, &plan.env, &plan.cwd).ok_or_else(|| missing(&plan))?;
    let mut command = Command::new(&program);
    command
        .arg0(plan.command)
        .args(plan.args)
        .env_clear()
        .envs(&plan.env);
    if plan.user.uid != rustix::process::geteuid().as_raw() {
        command.uid(plan.user.uid).gid(plan.user.gid);
    }
    let terminal = match streams {
        Streams::Pipes { stdin } => {
            let input = if stdin { Stdio::piped() } else { Stdio::null() };
            command
                .stdin(input)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0);
            None
        }
        Streams::Terminal(size) => {
            let failed = |error| Fault::io("open", "a terminal", &error);
            let (master, slave) = terminal(size).map_err(failed)?;
            let copy = || slave.try_clone().map(Stdio::from).map_err(failed);
            command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
            sys::own_terminal(&mut command);
            Some(master)
        }
    };
    let mut child = within(&plan.cwd, || command.spawn())
        .map_err(|error| failed_start(&plan, &program, &error))?;
    Ok(Spawned {
        pid: child.id(),
        stdin: child.stdin.take().map(OwnedFd::from),
        stdout: child.stdout.take().map(OwnedFd::from),
        stderr: child.stderr.take().map(OwnedFd::from),
        terminal,
    })
}

/// Does `work` with another working directory. The agent itself uses only absolute paths, and no
/// other thread starts programs.
fn within<T>(dir: &Path, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let back = rustix::fs::open(".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    rustix::process::chdir(dir)?;
    let result = work();
    match back {
        Ok(back) => rustix::process::fchdir(back)?,
        Err(_) => rustix::process::chdir("/")?,
    }
    result
}

fn terminal(size: PtySize) -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
    super::resize(&master, size)?;
    Ok((master, slave))
}

fn missing(plan: &Plan<'_>) -> Fault {
    let command = plan.command;
    let message = if command.is_empty() {
        return Fault::invalid("no command was given");
    } else if command.contains('/') {
        format!("{command}: no such file in the guest")
    } else {
        let path = plan.env.get("PATH").map_or("", String::as_str);
        format!("{command}: command not found in the guest (PATH is {path})")
    };
    Fault::new(Code::NotFound, message)
}

fn failed_start(plan: &Plan<'_>, program: &Path, error: &io::Error) -> Fault {
    let command = plan.command;
    match error.raw_os_error() {
        Some(libc::ENOENT) => Fault::new(
            Code::NotFound,
            format!(
                "{command}: {} is there, but the interpreter or loader it names is missing in the \
                 guest",
                program.display()
            ),
        ),
        Some(libc::ENOEXEC) => Fault::new(
            Code::FailedPrecondition,
            format!(
                "{command}: {} is no program for this machine; a script needs a first line such as \
                 #!/bin/sh",
                program.display()
            ),
        ),
        Some(libc::E2BIG) => Fault::invalid(format!(
            "{command}: arguments and environment are too long together"
        )),
        Some(libc::EAGAIN | libc::EMFILE | libc::ENFILE) => Fault::new(
            Code::ResourceExhausted,
            format!("{command}: the guest cannot start more processes now: {error}"),
        ),
        _ => Fault::io("start", command, error),
    }
}
