//! One Python process and what is said to it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkd_wire::agent::EvalResponse;
use forkd_wire::agent::connect::Code;
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, WaitStatus, kill_process, kill_process_group};
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::fd::Stream;
use crate::process::table::Table;
use crate::rpc::Fault;

const DRIVER: &str = include_str!("driver.py");
/// A signal that Python programs leave alone: SIGRTMAX - 2.
const RESEED_SIGNAL: i32 = 62;
/// The most that is kept of each output of one evaluation, bytes.
const MAX_OUTPUT: usize = 1 << 20;
/// The longest answer; the driver keeps to less.
const MAX_ANSWER: usize = 16 << 20;
/// How long an interpreter may take to start.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long an interrupted evaluation may take to give up.
const INTERRUPT_GRACE: Duration = Duration::from_secs(2);
/// How long an interpreter may take to reseed. One that is deep in native code cannot, and one of many guests that were
/// forked at once waits for its turn on the host's processors. Below the time that the host gives a fork to be ready.
const RESEED_LIMIT: Duration = Duration::from_secs(60);

/// How an evaluation came out.
#[derive(Debug)]
pub(super) enum Ended {
    Answered(EvalResponse),
    /// Its time was up; the interpreter lives on.
    Interrupted,
    /// Its time was up, and the interpreter had to die for it.
    Killed,
    /// The interpreter ended.
    Died {
        how: String,
        stderr: String,
    },
}

/// A running interpreter.
#[derive(Debug)]
pub(super) struct Interpreter {
    pid: Pid,
    control: Stream,
    stdout: Captured,
    stderr: Captured,
    exit: oneshot::Receiver<WaitStatus>,
    gone: Arc<AtomicBool>,
}

/// The way to an interpreter that is busy.
#[derive(Debug)]
pub(super) struct Reseeder {
    pid: Pid,
    signals: Stream,
    gone: Arc<AtomicBool>,
}

/// One of its outputs.
#[derive(Debug)]
struct Captured {
    stream: Option<Stream>,
    kept: Vec<u8>,
    cut: bool,
}

#[derive(Debug, Deserialize)]
struct Ready {
    #[serde(rename = "ready")]
    _version: String,
}

#[derive(Debug, Deserialize)]
struct Reseeded {
    #[serde(default)]
    reseeded: Vec<String>,
    #[serde(default)]
    error: Option<String>,
}

fn failed(step: &str, error: &io::Error) -> Fault {
    Fault::io(step, "the Python interpreter", error)
}

impl Interpreter {
    pub(super) async fn start(
        path: &Path,
        env: &BTreeMap<String, String>,
        table: &Table,
    ) -> Result<(Self, Reseeder), Fault> {
        let connect = |error| failed("connect to", &error);
        let (control, their_control) = pair().map_err(connect)?;
        let (signals, their_signals) = pair().map_err(connect)?;
        let mut command = Command::new(path);
        command.args(["-u", "-c", DRIVER]);
        command.args([&their_control, &their_signals].map(|fd| fd.as_raw_fd().to_string()));
        command.arg(RESEED_SIGNAL.to_string()).env_clear().envs(env);
        if !env.contains_key("HOME") {
            command.env("HOME", "/root");
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .process_group(0)
            .spawn()
            .map_err(|error| failed("start", &error))?;
        let watched = table.watch(child.id());
        drop((their_control, their_signals));
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let Some(pid) = pid else {
            return Err(Fault::new(Code::Internal, "no process id"));
        };
        let gone = Arc::new(AtomicBool::new(false));
        let (sender, exit) = oneshot::channel();
        let noted = Arc::clone(&gone);
        tokio::spawn(async move {
            let status = watched.await;
            noted.store(true, Ordering::Relaxed);
            let _ = status.map(|status| sender.send(status));
        });
        let capture = |fd: Option<OwnedFd>| {
            let stream = fd.map(Stream::reader).transpose();
            stream
                .map(|stream| Captured {
                    stream,
                    kept: Vec::new(),
                    cut: false,
                })
                .map_err(connect)
        };
        let mut interpreter = Self {
            pid,
            control: Stream::duplex(control).map_err(connect)?,
            stdout: capture(child.stdout.take().map(OwnedFd::from))?,
            stderr: capture(child.stderr.take().map(OwnedFd::from))?,
            exit,
            gone: Arc::clone(&gone),
        };
        let signals = Stream::duplex(signals).map_err(connect)?;
        let reseeder = Reseeder { pid, signals, gone };
        interpreter.expect_ready().await?;
        Ok((interpreter, reseeder))
    }

    async fn expect_ready(&mut self) -> Result<(), Fault> {
        let ready = tokio::select! {
            ready = timeout(START_LIMIT, receive::<Ready>(&self.control)) => ready,
            // Whatever it prints is why it does not start.
            () = self.stderr.collect() => Ok(Err(io::ErrorKind::UnexpectedEof.into())),
        };
        if let Ok(Ok(_)) = ready {
            return Ok(());
        }
        self.kill();
        self.stderr.drain();
        let said = self.stderr.take_text();
        let why = if said.is_empty() {
            "it said nothing".to_owned()
        } else {
            said
        };
        Err(Fault::new(
            Code::FailedPrecondition,
            format!(
                "the Python interpreter in the guest does not start: {}",
                why.trim_end()
            ),
        ))
    }

    /// Whether it has ended.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Evaluates `code`, and interrupts it when `limit` is over or the caller cancels.
    pub(super) async fn evaluate(
        &mut self,
        code: &str,
        limit: Option<Duration>,
        cancelled: oneshot::Receiver<()>,
    ) -> Ended {
        // Output between evaluations, of a thread perhaps, belongs to the next one.
        let request = serde_json::json!({ "code": code });
        if send(&self.control, &request).await.is_err() {
            return self.died().await;
        }
        let stop = async {
            let expired = async {
                match limit {
                    Some(limit) => tokio::time::sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            let asked = async {
                if cancelled.await.is_err() {
                    std::future::pending().await
                }
            };
            tokio::select! { () = expired => {}, () = asked => {} }
        };
        let mut stop = std::pin::pin!(stop);
        let mut interrupted: Option<Instant> = None;
        let answer = {
            let receiving = receive::<EvalResponse>(&self.control);
            let mut receiving = std::pin::pin!(receiving);
            loop {
                let killing = async {
                    match interrupted {
                        Some(at) => tokio::time::sleep_until(at + INTERRUPT_GRACE).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    answer = &mut receiving => break Some(answer),
                    () = self.stdout.collect() => {}
                    () = self.stderr.collect() => {}
                    () = &mut stop, if interrupted.is_none() => {
                        interrupted = Some(Instant::now());
                        let _ = kill_process(self.pid, Signal::INT);
                    }
                    () = killing => break None,
                }
            }
        };
        match answer {
            None => {
                self.kill();
                Ended::Killed
            }
            Some(Err(_)) => self.died().await,
            Some(Ok(_)) if interrupted.is_some() => {
                self.take_outputs();
                Ended::Interrupted
            }
            Some(Ok(mut answer)) => {
                let (stdout, stderr, cut) = self.take_outputs();
                answer.stdout = stdout;
                answer.stderr = stderr;
                answer.truncated |= cut;
                Ended::Answered(answer)
            }
        }
    }

    fn take_outputs(&mut self) -> (String, String, bool) {
        self.stdout.drain();
        self.stderr.drain();
        let cut = self.stdout.cut || self.stderr.cut;
        (self.stdout.take_text(), self.stderr.take_text(), cut)
    }

    async fn died(&mut self) -> Ended {
        // It has closed its end, so it is ending; a grandchild may only make it look so.
        let status = timeout(INTERRUPT_GRACE, &mut self.exit).await;
        self.kill();
        let how = match status {
            Ok(Ok(status)) => ExitStatus::from_raw(status.as_raw()).to_string(),
            _ => "it closed its channel".to_owned(),
        };
        self.stderr.drain();
        let stderr = self.stderr.take_text();
        let tail = stderr
            .char_indices()
            .rev()
            .nth(2000)
            .map_or(0, |(at, _)| at);
        Ended::Died {
            how,
            stderr: stderr[tail..].to_owned(),
        }
    }

    fn kill(&mut self) {
        if !self.is_gone() {
            let _ = kill_process_group(self.pid, Signal::KILL);
        }
        self.gone.store(true, Ordering::Relaxed);
    }
}

impl Drop for Interpreter {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Reseeder {
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    pub(super) async fn reseed(
        &mut self,
        env: &BTreeMap<String, String>,
    ) -> Result<Vec<String>, Fault> {
        let work = async {
            send(&self.signals, &serde_json::json!({ "env": env })).await?;
            let signal = Signal::from_named_raw(RESEED_SIGNAL);
            let raw = self.pid.as_raw_nonzero().get();
            match signal {
                Some(signal) => kill_process(self.pid, signal)?,
                None => crate::sys::kill(raw, RESEED_SIGNAL)?,
            }
            receive::<Reseeded>(&self.signals).await
        };
        let unable = |why: String| {
            Fault::new(
                Code::Internal,
                format!("the Python interpreter did not reseed its generators: {why}"),
            )
        };
        match timeout(RESEED_LIMIT, work).await {
            Ok(Ok(Reseeded {
                error: None,
                reseeded,
            })) => Ok(reseeded),
            Ok(Ok(Reseeded {
                error: Some(error), ..
            })) => Err(unable(error)),
            Ok(Err(error)) => Err(unable(error.to_string())),
            Err(_) => Err(unable(format!(
                "it has not answered for {} s: it is busy in native code, or the host is overloaded",
                RESEED_LIMIT.as_secs()
            ))),
        }
    }
}

impl Captured {
    /// Keeps what comes, and returns when nothing more can come at all.
    async fn collect(&mut self) {
        let mut buf = [0; 8192];
        while let Some(stream) = &self.stream {
            match stream.read(&mut buf).await {
                Ok(0) | Err(_) => self.stream = None,
                Ok(read) => self.keep(&buf[..read]),
            }
        }
        std::future::pending::<()>().await;
    }

    /// Keeps what is there now; no more than a pipe can hold, in case somebody writes on and on.
    fn drain(&mut self) {
        let mut buf = [0; 8192];
        for _ in 0..128 {
            match self
                .stream
                .as_ref()
                .and_then(|stream| stream.try_read(&mut buf))
            {
                None | Some(0) => return,
                Some(read) => self.keep(&buf[..read]),
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_OUTPUT - self.kept.len();
        self.cut |= bytes.len() > room;
        self.kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn take_text(&mut self) -> String {
        self.cut = false;
        let bytes = std::mem::take(&mut self.kept);
        String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }
}

/// A pair of sockets: ours, closed when a program is started, and one that the next child inherits.
/// The latter must be closed before anything else is started.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
    Ok((ours, theirs))
}

async fn send(stream: &Stream, message: &serde_json::Value) -> io::Result<()> {
    let text = message.to_string();
    // Requests are bounded by MAX_MESSAGE.
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    stream.write_all(&bytes).await
}

async fn receive<T: for<'de> Deserialize<'de>>(stream: &Stream) -> io::Result<T> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let len = u32::from_be_bytes(head) as usize;
    if len > MAX_ANSWER {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await?;
    serde_json::from_slice(&bytes).map_err(io::Error::from)
}
