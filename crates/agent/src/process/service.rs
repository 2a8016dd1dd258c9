//! The calls of `process.Process`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use forkd_wire::agent::connect::{Code, TIMEOUT_HEADER};
use forkd_wire::agent::process::{
    EventResponse, InputEvent, KeepAlive, ProcessEvent, ProcessInput, SelectRequest,
    SendInputRequest, SendSignalRequest, StartEvent, StartRequest, StreamInputRequest,
    UpdateRequest,
};
use http::{HeaderMap, Request};
use hyper::body::Incoming;
use tokio::sync::mpsc;

use super::output::{Outputs, Source, pump};
use super::spawn::{Plan, Streams, spawn};
use super::{Input, Process};
use crate::agent::Agent;
use crate::fd::Stream;
use crate::rpc::{self, ChannelBody, Connection, Fault, Messages, Reply};
use crate::users::{self, User};

/// Kills the process when its caller cancels the stream, and not when the connection is lost: a fork
/// of a running sandbox begins with a lost connection and must go on with its work.
#[derive(Debug)]
struct KillOnCancel {
    process: Arc<Process>,
    connection: Arc<Connection>,
    wanted: bool,
}

impl Drop for KillOnCancel {
    fn drop(&mut self) {
        if self.wanted && !self.connection.is_lost() {
            self.process.kill();
        }
    }
}

/// `Start`: runs a program and streams what it says.
pub(crate) async fn start(agent: &Arc<Agent>, request: Request<Incoming>) -> Reply {
    let connection = request
        .extensions()
        .get::<Arc<Connection>>()
        .cloned()
        .unwrap_or_default();
    match try_start(agent, request).await {
        Err(fault) => fault.stream(),
        Ok((process, events, kill_on_cancel)) => {
            let guard = KillOnCancel {
                process,
                connection,
                wanted: kill_on_cancel,
            };
            rpc::stream_reply(ChannelBody::boxed(events, guard))
        }
    }
}

async fn try_start(
    agent: &Arc<Agent>,
    request: Request<Incoming>,
) -> Result<(Arc<Process>, mpsc::Receiver<Bytes>, bool), Fault> {
    let headers = request.headers().clone();
    let request: StartRequest = rpc::read_first(request).await?;
    agent.processes.check_room()?;
    let name = request.user.clone().or_else(|| users::of_request(&headers));
    let user = users::find(name.as_deref().or_else(|| agent.image.user()))?;
    let limit = time_limit(&headers, request.timeout_ms)?;
    let kill_on_cancel = request.kill_on_cancel;
    let streams = match request.pty {
        Some(pty) => Streams::Terminal(pty.size),
        None => Streams::Pipes {
            stdin: request.stdin.unwrap_or(true),
        },
    };
    let process = begin(agent, request, &user, streams)?;
    let (process, outputs, exit) = process;
    let started = ProcessEvent::Start(StartEvent { pid: process.pid });
    let events = process.subscribe(rpc::message(&EventResponse { event: started }, false));
    let running = Arc::clone(&process);
    let table = Arc::clone(&agent.processes);
    tokio::spawn(async move {
        let timer = limit.map(|limit| tokio::spawn(kill_after(Arc::clone(&running), limit)));
        pump(running, outputs, exit, table).await;
        if let Some(timer) = timer {
            timer.abort();
        }
    });
    Ok((process, events, kill_on_cancel))
}

type Begun = (
    Arc<Process>,
    Outputs,
    tokio::sync::oneshot::Receiver<rustix::process::WaitStatus>,
);

fn begin(
    agent: &Agent,
    request: StartRequest,
    user: &User,
    streams: Streams,
) -> Result<Begun, Fault> {
    let mut env = agent.env();
    env.entry("HOME".to_owned())
        .or_insert_with(|| user.home.to_string_lossy().into_owned());
    env.entry("USER".to_owned())
        .or_insert_with(|| user.name.clone());
    env.entry("LOGNAME".to_owned())
        .or_insert_with(|| user.name.clone());
    env.entry("SHELL".to_owned())
        .or_insert_with(|| user.shell.clone());
    if matches!(streams, Streams::Terminal(_)) {
        env.entry("TERM".to_owned())
            .or_insert_with(|| "xterm-256color".to_owned());
    }
    env.extend(request.process.envs.clone());
    let cwd = match request.process.cwd.as_deref().filter(|cwd| !cwd.is_empty()) {
        Some(cwd) => user.resolve(cwd),
        None if !agent.image.workdir.is_empty() => user.resolve(&agent.image.workdir),
        None if user.home.is_dir() => user.home.clone(),
        None => "/".into(),
    };
    let config = &request.process;
    let plan = Plan {
        command: &config.cmd,
        args: &config.args,
        env,
        cwd,
        user,
    };
    let spawned = spawn(plan, streams)?;
    // From here on nothing may wait before the child is watched.
    let exit = agent.processes.watch(spawned.pid);
    let broken = |error| Fault::io("watch the streams of", &config.cmd, &error);
    let mut open = Vec::with_capacity(2);
    for (source, fd) in [
        (Source::Stdout, spawned.stdout),
        (Source::Stderr, spawned.stderr),
    ] {
        if let Some(fd) = fd {
            open.push((source, Stream::reader(fd).map_err(broken)?));
        }
    }
    let input = match spawned.stdin {
        Some(fd) => Input::Pipe(Stream::writer(fd).map_err(broken)?),
        None => Input::None,
    };
    let process = Arc::new(Process {
        terminal: spawned
            .terminal
            .map(Stream::duplex)
            .transpose()
            .map_err(broken)?,
        config: request.process,
        tag: request.tag,
        pid: spawned.pid,
        input: tokio::sync::Mutex::new(input),
        subscribers: std::sync::Mutex::default(),
        gone: AtomicBool::new(false),
        timed_out: AtomicBool::new(false),
    });
    agent.processes.insert(Arc::clone(&process));
    Ok((process, Outputs::new(open), exit))
}

/// The shorter of the two limits a caller can give; zero is none.
fn time_limit(headers: &HeaderMap, field_ms: u64) -> Result<Option<Duration>, Fault> {
    let header = match headers.get(TIMEOUT_HEADER) {
        None => 0,
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
            .ok_or_else(|| Fault::invalid(format!("{TIMEOUT_HEADER} is no number: {value:?}")))?,
    };
    let shortest = [header, field_ms].into_iter().filter(|ms| *ms > 0).min();
    Ok(shortest.map(Duration::from_millis))
}

async fn kill_after(process: Arc<Process>, limit: Duration) {
    tokio::time::sleep(limit).await;
    process.timed_out.store(true, Ordering::Relaxed);
    process.kill();
}

/// `Connect`: streams what a running process says from now on.
pub(crate) async fn connect(agent: &Arc<Agent>, request: Request<Incoming>) -> Reply {
    let find = async {
        let request: SelectRequest = rpc::read_first(request).await?;
        agent.processes.find(&request.process)
    };
    match find.await {
        Err(fault) => fault.stream(),
        Ok(process) => {
            let started = ProcessEvent::Start(StartEvent { pid: process.pid });
            let first = rpc::message(&EventResponse { event: started }, false);
            rpc::stream_reply(ChannelBody::boxed(process.subscribe(first), ()))
        }
    }
}

/// `Update`: changes the size of a terminal.
pub(crate) fn update(agent: &Agent, request: &UpdateRequest) -> Result<KeepAlive, Fault> {
    let process = agent.processes.find(&request.process)?;
    if let Some(pty) = request.pty {
        process.resize(pty.size).map_err(|error| {
            let message = format!("process {} has no terminal to resize: {error}", process.pid);
            Fault::new(Code::FailedPrecondition, message)
        })?;
    }
    Ok(KeepAlive {})
}

/// `SendInput`: writes to a process; answered when the process's pipe has taken it.
pub(crate) async fn send_input(
    agent: &Agent,
    request: SendInputRequest,
) -> Result<KeepAlive, Fault> {
    let process = agent.processes.find(&request.process)?;
    write(&process, request.input).await?;
    Ok(KeepAlive {})
}

async fn write(process: &Process, input: ProcessInput) -> Result<(), Fault> {
    let pid = process.pid;
    let lacks = |what: &str| Fault::new(Code::FailedPrecondition, format!("process {pid} {what}"));
    let (stdin, result);
    match (&process.terminal, input) {
        (Some(terminal), ProcessInput::Pty(bytes) | ProcessInput::Stdin(bytes)) => {
            result = terminal.write_all(&bytes).await;
        }
        (None, ProcessInput::Pty(_)) => return Err(lacks("has no terminal; send stdin instead")),
        (None, ProcessInput::Stdin(bytes)) => {
            stdin = process.input.lock().await;
            match &*stdin {
                Input::Pipe(pipe) => result = pipe.write_all(&bytes).await,
                Input::None => return Err(lacks("was started without stdin; start it with one")),
                Input::Closed => return Err(lacks("has had its stdin closed")),
            }
        }
    }
    result.map_err(|error| lacks(&format!("does not read its input any more: {error}")))
}

/// `StreamInput`: writes to one process, message after message.
pub(crate) async fn stream_input(agent: &Arc<Agent>, request: Request<Incoming>) -> Reply {
    let work = async {
        let mut messages = Messages::new(request)?;
        let mut process = None;
        while let Some(message) = messages.next::<StreamInputRequest>().await? {
            match (message.event, &process) {
                (InputEvent::Start(select), _) => {
                    process = Some(agent.processes.find(&select.process)?);
                }
                (InputEvent::Data(data), Some(process)) => write(process, data.input).await?,
                (InputEvent::Data(_), None) => {
                    return Err(Fault::invalid("input came before the process was named"));
                }
                (InputEvent::Keepalive(_), _) => {}
            }
        }
        Ok(())
    };
    match work.await {
        Err(fault) => fault.stream(),
        Ok(()) => {
            let mut bytes = rpc::message(&KeepAlive {}, false).to_vec();
            bytes.extend_from_slice(&rpc::end_stream());
            rpc::stream_reply(rpc::full(bytes))
        }
    }
}

/// `SendSignal`: signals a process's group.
pub(crate) fn send_signal(agent: &Agent, request: &SendSignalRequest) -> Result<KeepAlive, Fault> {
    let process = agent.processes.find(&request.process)?;
    let number = request.signal.0;
    let signal = rustix::process::Signal::from_named_raw(number)
        .ok_or_else(|| Fault::invalid(format!("signal {number} cannot be sent")))?;
    process.signal(signal).map_err(|error| {
        Fault::new(
            Code::NotFound,
            format!("process {} has ended: {error}", process.pid),
        )
    })?;
    Ok(KeepAlive {})
}

/// `CloseStdin`: the process reads the end of its input.
pub(crate) async fn close_stdin(
    agent: &Agent,
    request: &SelectRequest,
) -> Result<KeepAlive, Fault> {
    let process = agent.processes.find(&request.process)?;
    if process.terminal.is_some() {
        return Err(Fault::new(
            Code::FailedPrecondition,
            format!(
                "process {} runs on a terminal; send it Ctrl-D (0x04) instead",
                process.pid
            ),
        ));
    }
    *process.input.lock().await = Input::Closed;
    Ok(KeepAlive {})
}
