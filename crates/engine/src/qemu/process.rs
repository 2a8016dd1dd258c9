//! A QEMU process: started, greeted, watched until it is gone.

use std::fs::File;
use std::io::PipeReader;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkd_host::process::{self as host, Process, Spawn, Stdio};
use serde_json::Value;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::arguments::{Launch, NotUtf8, Sockets, Start, arguments};
use super::client::{self, Client, Seen};
use super::names::{AGENT, CONSOLE, CONSOLE_LOG, CONTROL};
use super::request::{Command, Shutdown, Status, parse_status};
use super::{Setup, console, missing};
use crate::output::Output;
use crate::rundir::{RunDir, failed};
use crate::{Error, Exit, Lifetime, MachineSpec, ProcessIdentity, SlotHandles, blocking};

/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How long a loaded VM may take to run, on a host with far more VMs than cores.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// How long to wait for last words after the end.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Sandboxes go before the daemon when the host's memory runs out.
const OOM_SCORE: i16 = 500;

/// A process to start.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) setup: Arc<Setup>,
    pub(super) id: String,
    pub(super) run_dir: PathBuf,
    pub(super) machine: MachineSpec,
    pub(super) ram: PathBuf,
    pub(super) first: First,
    pub(super) lifetime: Lifetime,
    pub(super) slot: Option<SlotHandles>,
}

/// What it does first.
#[derive(Debug)]
pub(super) enum First {
    /// Boot, with this rate of the time-stamp counter.
    Boot(Option<u64>),
    /// Load device state from this file, from where it stands.
    Load(File),
}

/// A QEMU process that somebody holds on to. Until [`Monitor::keep`] is called, letting go kills it.
#[derive(Debug)]
pub(super) struct Monitor {
    process: Arc<Process>,
    client: Client,
    output: Arc<Output>,
    exit: watch::Receiver<Option<Exit>>,
    kept: AtomicBool,
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
    } = started;
    let output = Output::follow(stderr);
    let log = run_dir.file(CONSOLE_LOG);
    tokio::spawn(console::pump(console_socket, log));
    let monitor = Monitor::attach(guard.disarm(), control, output)?;
    monitor.command(Command::Capabilities).await?;
    Ok((run_dir, monitor))
}

struct Started {
    run_dir: RunDir,
    guard: Guard,
    control: UnixStream,
    console: UnixStream,
    stderr: PipeReader,
}

/// A new process that nobody watches yet.
struct Guard(Option<Process>);

impl Guard {
    fn disarm(mut self) -> Process {
        self.0.take().expect("a guard is disarmed once")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            let killed = process.kill().and_then(|()| process.wait_for(LAST_WORDS));
            if let Err(error) = killed {
                tracing::error!(%error, "a QEMU process may be left over");
            }
        }
    }
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
    let mut inherit: Vec<OwnedFd> = vec![control.into(), agent.into(), console.into()];
    let start = match plan.first {
        First::Boot(tsc_khz) => Start::Boot { tsc_khz },
        First::Load(file) => {
            let state = file.as_raw_fd();
            inherit.push(file.into());
            Start::Load { state }
        }
    };
    let slot = plan.slot.unwrap_or(SlotHandles::NONE);
    let tap = match slot.tap {
        None if plan.machine.network => plan.setup.nowhere.tap(),
        tap => tap,
    };
    let program = &plan.setup.program;
    let launch = Launch {
        id: &plan.id,
        machine: &plan.machine,
        accel: plan.setup.accel,
        tap: tap.as_ref().map(AsRawFd::as_raw_fd),
        ram: &plan.ram,
        start,
        sockets,
    };
    let args = arguments(&launch).map_err(not_utf8)?;
    let (stderr, writer) = std::io::pipe().map_err(failed("pipe the output of", program))?;
    inherit.extend(tap);
    let process = Process::spawn(Spawn {
        stderr: Stdio::Fd(writer.into()),
        inherit,
        die_with_parent: plan.lifetime == Lifetime::DieWithParent,
        cgroup: slot.cgroup,
        netns: slot.netns,
        ..Spawn::new(program, args)
    });
    let guard = Guard(Some(process.map_err(|error| not_started(program, error))?));
    Ok(Started {
        run_dir,
        guard,
        control: streams.0,
        console: streams.1,
        stderr,
    })
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
        let step = command.step();
        match self.client.command(&command).await {
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
            detail: crate::error::chain(&error),
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

/// Waits for the end of a process, reaps it, and says how it ended as far as the guest is concerned.
async fn watch_end(
    process: &Process,
    pidfd: &AsyncFd<OwnedFd>,
    mut seen: watch::Receiver<Seen>,
) -> Exit {
    if let Err(error) = pidfd.readable().await {
        tracing::error!(%error, "a process cannot be watched");
        return Exit::Unknown;
    }
    let exit = process.try_wait().unwrap_or_else(|error| {
        tracing::error!(%error, "a process cannot be reaped");
        None
    });
    // What it said before it left may still be on its way here.
    let closed = seen.wait_for(|seen| seen.closed);
    let _ = tokio::time::timeout(LAST_WORDS, closed).await;
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
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::Reset => "the guest reset its machine".to_owned(),
        Exit::Unknown => "nobody knows how".to_owned(),
    }
}

fn not_utf8(NotUtf8(path): NotUtf8) -> Error {
    failed("give QEMU the path", &path)(std::io::Error::new(
        std::io::ErrorKind::InvalidInput,
        "the path is not valid UTF-8",
    ))
}

fn not_started(program: &Path, error: host::Error) -> Error {
    match error {
        host::Error::Spawn { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            missing(program)
        }
        host::Error::Spawn { source, .. } => Error::Spawn {
            program: program.display().to_string(),
            source,
        },
        other => Error::Spawn {
            program: program.display().to_string(),
            source: std::io::Error::other(other),
        },
    }
}
