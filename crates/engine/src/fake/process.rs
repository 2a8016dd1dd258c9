//! Processes of a fake guest: a few commands, each a task.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use forkd_wire::agent::ConnectError;
use forkd_wire::agent::connect::{
    Code, ENVELOPE, EndStream, STREAM_CONTENT_TYPE, envelope, read_envelope,
};
use forkd_wire::agent::process::{
    DataEvent, EndEvent, EventResponse, ListResponse, ProcessConfig, ProcessEvent, ProcessInfo,
    ProcessInput, ProcessSelector, SelectRequest, SendInputRequest, SendSignalRequest, Signal,
    StartEvent, StartRequest,
};
use http::Response;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::{mpsc, watch};

use super::agent::{Answer, Body, json, parse, respond};
use super::guest::Guest;

/// Messages that wait for a slow reader.
const QUEUE: usize = 16;
/// Input that waits for a slow process.
const INPUT: usize = 16;
const SIGKILL: i32 = 9;
/// The commands there are.
const COMMANDS: [&str; 8] = [
    "cat", "echo", "exit", "false", "hostname", "printenv", "sleep", "true",
];

/// The processes that run.
#[derive(Debug, Default)]
pub(super) struct Processes(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    last_pid: u32,
    running: BTreeMap<u32, Running>,
}

#[derive(Debug)]
struct Running {
    info: ProcessInfo,
    input: Option<mpsc::Sender<Vec<u8>>>,
    signal: watch::Sender<Option<i32>>,
    listeners: Listeners,
}

/// Who hears of a process: whoever started it, and whoever came later.
#[derive(Debug, Clone)]
struct Listeners(Arc<Mutex<Vec<mpsc::Sender<Bytes>>>>);

impl Listeners {
    fn of(first: mpsc::Sender<Bytes>) -> Listeners {
        Listeners(Arc::new(Mutex::new(vec![first])))
    }

    fn list(&self) -> MutexGuard<'_, Vec<mpsc::Sender<Bytes>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, message: Bytes) {
        let listeners = self.list().clone();
        for listener in listeners {
            // Nobody may listen any more; the process goes on all the same.
            let _ = listener.send(message.clone()).await;
        }
    }
}

impl Processes {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn list(&self) -> ListResponse {
        let table = self.table();
        let processes = table.running.values().map(|process| process.info.clone());
        ListResponse {
            processes: processes.collect(),
        }
    }

    pub(super) fn input(&self, request: SendInputRequest) -> Answer {
        let (ProcessInput::Stdin(bytes) | ProcessInput::Pty(bytes)) = request.input;
        let mut table = self.table();
        let process = table.find(&request.process)?;
        let closed = || ConnectError::new(Code::FailedPrecondition, "standard input is closed");
        let full = |_| ConnectError::new(Code::ResourceExhausted, "the process does not read");
        process
            .input
            .as_ref()
            .ok_or_else(closed)?
            .try_send(bytes)
            .map_err(full)?;
        json(&serde_json::json!({}))
    }

    pub(super) fn close_input(&self, request: &SelectRequest) -> Answer {
        self.table().find(&request.process)?.input = None;
        json(&serde_json::json!({}))
    }

    pub(super) fn signal(&self, request: &SendSignalRequest) -> Answer {
        let Signal(number) = request.signal;
        self.table()
            .find(&request.process)?
            .signal
            .send_replace(Some(number));
        json(&serde_json::json!({}))
    }

    pub(super) fn kill_all(&self) {
        for process in self.table().running.values() {
            process.signal.send_replace(Some(SIGKILL));
        }
    }
}

impl Table {
    fn find(&mut self, selector: &ProcessSelector) -> Result<&mut Running, ConnectError> {
        let matches = |process: &&mut Running| match selector {
            ProcessSelector::Pid(pid) => process.info.pid == *pid,
            ProcessSelector::Tag(tag) => process.info.tag.as_ref() == Some(tag),
        };
        let missing = || ConnectError::new(Code::NotFound, "there is no such process");
        self.running.values_mut().find(matches).ok_or_else(missing)
    }
}

/// A command with everything it needs.
struct Task {
    config: ProcessConfig,
    env: BTreeMap<String, String>,
    hostname: String,
    input: mpsc::Receiver<Vec<u8>>,
    output: Listeners,
}

/// Starts a process; the answer is the stream of its events.
pub(super) fn start(guest: &Arc<Guest>, body: &Bytes) -> Answer {
    let request: StartRequest = enveloped(body)?;
    let (output, messages) = mpsc::channel(QUEUE);
    let (guest, output) = (Arc::clone(guest), Listeners::of(output));
    tokio::spawn(async move {
        let error = run(&guest, request, output.clone()).await.err();
        output.send(framed(&EndStream { error }, true)).await;
    });
    Ok(events(messages))
}

/// Follows a process from now on; the answer is the stream of its events.
pub(super) fn connect(guest: &Arc<Guest>, body: &Bytes) -> Answer {
    let request: SelectRequest = enveloped(body)?;
    let mut table = guest.processes.table();
    let process = table.find(&request.process)?;
    let (output, messages) = mpsc::channel(QUEUE);
    let pid = process.info.pid;
    let event = ProcessEvent::Start(StartEvent { pid });
    // The channel is empty, so there is room.
    let _ = output.try_send(framed(&EventResponse { event }, false));
    process.listeners.list().push(output);
    Ok(events(messages))
}

fn enveloped<T: serde::de::DeserializeOwned>(body: &Bytes) -> Result<T, ConnectError> {
    let short = || ConnectError::new(Code::InvalidArgument, "the message is cut short");
    let (head, message) = body.split_first_chunk::<ENVELOPE>().ok_or_else(short)?;
    let (len, _) = read_envelope(*head)
        .map_err(|error| ConnectError::new(Code::InvalidArgument, error.to_string()))?;
    parse(message.get(..len).ok_or_else(short)?)
}

fn events(messages: mpsc::Receiver<Bytes>) -> Response<Body> {
    let stream = futures_util::stream::unfold(messages, |mut messages| async move {
        let message = messages.recv().await?;
        Some((Ok(Frame::data(message)), messages))
    });
    let body = StreamBody::new(stream).boxed_unsync();
    respond(200, STREAM_CONTENT_TYPE, body)
}

fn framed<T: serde::Serialize>(message: &T, end: bool) -> Bytes {
    let json = serde_json::to_vec(message).unwrap_or_default();
    let mut bytes = envelope(json.len(), end).to_vec();
    bytes.extend_from_slice(&json);
    bytes.into()
}

async fn run(guest: &Guest, request: StartRequest, output: Listeners) -> Result<(), ConnectError> {
    let name = request.process.cmd.rsplit('/').next().unwrap_or_default();
    if !COMMANDS.contains(&name) {
        let text = format!("{}: no such program in the guest", request.process.cmd);
        return Err(ConnectError::new(Code::NotFound, text));
    }
    let (feed, input) = mpsc::channel(INPUT);
    let (signal, mut signalled) = watch::channel(None);
    let pid = {
        let mut table = guest.processes.table();
        table.last_pid += 1;
        let pid = table.last_pid;
        let info = ProcessInfo {
            config: request.process.clone(),
            pid,
            tag: request.tag.clone(),
        };
        let input = request.stdin.unwrap_or(true).then_some(feed);
        table.running.insert(
            pid,
            Running {
                info,
                input,
                signal,
                listeners: output.clone(),
            },
        );
        pid
    };
    let task = {
        let state = guest.state();
        let mut env = state.env.clone();
        env.extend(request.process.envs.clone());
        Task {
            config: request.process,
            env,
            hostname: state.hostname.clone(),
            input,
            output: output.clone(),
        }
    };
    say(&output, ProcessEvent::Start(StartEvent { pid })).await;
    let limit = match request.timeout_ms {
        0 => Duration::MAX,
        millis => Duration::from_millis(millis),
    };
    let end = tokio::select! {
        code = task.run() => left(code),
        Ok(number) = signalled.wait_for(Option::is_some) => killed(number.unwrap_or(SIGKILL), false),
        () = tokio::time::sleep(limit) => killed(SIGKILL, true),
    };
    guest.processes.table().running.remove(&pid);
    say(&output, ProcessEvent::End(end)).await;
    Ok(())
}

fn left(code: i32) -> EndEvent {
    EndEvent {
        exit_code: code,
        exited: true,
        status: format!("exit status {code}"),
        ..EndEvent::default()
    }
}

fn killed(signal: i32, timed_out: bool) -> EndEvent {
    EndEvent {
        exit_code: -1,
        status: format!("signal: {signal}"),
        signal: Some(signal),
        timed_out,
        ..EndEvent::default()
    }
}

async fn say(output: &Listeners, event: ProcessEvent) {
    output.send(framed(&EventResponse { event }, false)).await;
}

impl Task {
    /// Runs the command; answers its exit status.
    async fn run(mut self) -> i32 {
        let args = std::mem::take(&mut self.config.args);
        let name = self.config.cmd.rsplit('/').next().unwrap_or_default();
        match name {
            "true" => 0,
            "exit" => args.first().and_then(|code| code.parse().ok()).unwrap_or(0),
            "echo" => self.print(args.join(" ")).await,
            "hostname" => self.print(self.hostname.clone()).await,
            "printenv" => match args.first().map(|name| self.env.get(name)) {
                Some(Some(value)) => self.print(value.clone()).await,
                Some(None) => 1,
                None => {
                    let lines = self
                        .env
                        .iter()
                        .map(|(name, value)| format!("{name}={value}"));
                    let lines: Vec<String> = lines.collect();
                    self.print(lines.join("\n")).await
                }
            },
            "sleep" => {
                let seconds = args.first().and_then(|text| text.parse::<f64>().ok());
                let length = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
                let Some(length) = length else { return 1 };
                tokio::time::sleep(length).await;
                0
            }
            "cat" => {
                while let Some(bytes) = self.input.recv().await {
                    say(&self.output, ProcessEvent::Data(DataEvent::Stdout(bytes))).await;
                }
                0
            }
            _ => 1,
        }
    }

    async fn print(&self, text: String) -> i32 {
        let data = DataEvent::Stdout((text + "\n").into_bytes());
        say(&self.output, ProcessEvent::Data(data)).await;
        0
    }
}
