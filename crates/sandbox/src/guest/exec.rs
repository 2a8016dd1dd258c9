//! Processes in a guest.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use forkd_wire::agent::process::{
    CLOSE_STDIN_PATH, CONNECT_PATH, DataEvent, EventResponse, KeepAlive, LIST_PATH, ListRequest,
    ListResponse, ProcessConfig, ProcessEvent, ProcessInfo, ProcessInput, ProcessSelector, Pty,
    PtySize, SEND_INPUT_PATH, SEND_SIGNAL_PATH, START_PATH, SelectRequest, SendInputRequest,
    SendSignalRequest, Signal, StartRequest, UPDATE_PATH, UpdateRequest,
};
use futures_util::Stream;

use super::rpc::{self, Messages};
use super::{Client, Error, within};

/// How long the agent may take to start a process.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long signals and changes may take.
const CONTROL_LIMIT: Duration = Duration::from_secs(10);
/// How much longer than the process's own limit its end is waited for.
const END_GRACE: Duration = Duration::from_secs(5);
/// The most input sent in one call, bytes.
const INPUT_CHUNK: usize = 256 << 10;
/// The most of each output that [`Client::run`] keeps, bytes.
const MAX_KEPT: usize = 16 << 20;

/// What to run in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The program, looked up in the guest's `PATH` unless it is a path, and its arguments.
    pub args: Vec<String>,
    /// Environment over the guest's own.
    pub env: BTreeMap<String, String>,
    /// Working directory; the user's home if absent.
    pub cwd: Option<String>,
    /// User name or number; root if absent.
    pub user: Option<String>,
    /// Whether it gets a standard input that stays open until it is closed.
    pub stdin: bool,
    /// After this its whole process group is killed.
    pub timeout: Option<Duration>,
    /// Run on a terminal of this size.
    pub pty: Option<PtySize>,
    /// A name to find it by.
    pub tag: Option<String>,
    /// Whether it goes on when the caller drops the stream of its output.
    pub background: bool,
}

impl ExecRequest {
    /// Runs a program with arguments.
    pub fn new(args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            args: args.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// Runs a line of shell.
    pub fn shell(line: &str) -> Self {
        Self::new(["/bin/sh", "-c", line])
    }

    fn into_message(self) -> Result<StartRequest, Error> {
        let mut args = self.args.into_iter();
        let cmd = args
            .next()
            .filter(|cmd| !cmd.is_empty())
            .ok_or(Error::Request {
                what: "exec",
                detail: "no command was given".to_owned(),
            })?;
        let timeout_ms = self.timeout.map_or(0, |limit| {
            u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1)
        });
        Ok(StartRequest {
            process: ProcessConfig {
                cmd,
                args: args.collect(),
                envs: self.env,
                cwd: self.cwd,
            },
            pty: self.pty.map(|size| Pty { size }),
            tag: self.tag,
            stdin: Some(self.stdin),
            timeout_ms,
            kill_on_cancel: !self.background,
            user: self.user,
        })
    }
}

/// What a process did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It wrote to standard output, or to its terminal.
    Stdout(Bytes),
    /// It wrote to standard error.
    Stderr(Bytes),
    /// It is over; the last event.
    Exit(Exit),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its exit status, or 128 and the number of the signal that ended it, as a shell has it.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its time was up and it was killed.
    pub timed_out: bool,
}

/// What [`Client::run`] collected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// As [`Exit::code`].
    pub exit_code: i32,
    /// As [`Exit::signal`].
    pub signal: Option<i32>,
    /// Its time was up and it was killed.
    pub timed_out: bool,
    /// What it wrote to standard output, bounded.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error, bounded.
    pub stderr: Vec<u8>,
    /// Whether more was written than is kept here.
    pub truncated: bool,
}

/// A running process and the stream of what it does. Dropped, the process is killed, unless it was
/// started in the background.
#[derive(Debug)]
pub struct Exec {
    handle: ProcessHandle,
    messages: Messages,
}

/// A running process, to act upon.
#[derive(Debug, Clone)]
pub struct ProcessHandle {
    client: Client,
    pid: u32,
}

impl Client {
    /// Starts a process.
    pub async fn start(&self, request: ExecRequest) -> Result<Exec, Error> {
        let message = request.into_message()?;
        self.open("exec", START_PATH, &message).await
    }

    /// Follows a process that runs already. What it wrote before is not seen.
    pub async fn attach(&self, process: ProcessSelector) -> Result<Exec, Error> {
        self.open("attach", CONNECT_PATH, &SelectRequest { process })
            .await
    }

    async fn open<Q: serde::Serialize>(
        &self,
        what: &'static str,
        path: &str,
        message: &Q,
    ) -> Result<Exec, Error> {
        let request = rpc::stream_request(what, path, message)?;
        within(what, START_LIMIT, async {
            let response = rpc::check(what, self.send(what, request).await?).await?;
            let mut messages = Messages::new(what, response.into_body());
            match messages.next::<EventResponse>().await? {
                Some(EventResponse {
                    event: ProcessEvent::Start(start),
                }) => {
                    let handle = ProcessHandle {
                        client: self.clone(),
                        pid: start.pid,
                    };
                    Ok(Exec { handle, messages })
                }
                other => Err(Error::protocol(what, format!("it begins with {other:?}"))),
            }
        })
        .await
    }

    /// Runs a process to its end and collects what it writes. After `deadline` it is killed, and the
    /// output says so.
    pub async fn run(&self, mut request: ExecRequest, deadline: Duration) -> Result<Output, Error> {
        request.timeout = Some(
            request
                .timeout
                .map_or(deadline, |limit| limit.min(deadline)),
        );
        within("exec", deadline + END_GRACE, async {
            self.start(request).await?.collect().await
        })
        .await
    }

    /// The processes that were started in the guest and still run.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, Error> {
        let list: ListResponse = self
            .call("list processes", LIST_PATH, &ListRequest {}, CONTROL_LIMIT)
            .await?;
        Ok(list.processes)
    }
}

/// Keeps what there is room for, and says whether something was left out.
fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let room = MAX_KEPT - kept.len();
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    bytes.len() > room
}

impl Exec {
    /// The process's id in the guest.
    pub fn pid(&self) -> u32 {
        self.handle.pid
    }

    /// A handle that can be used while events are awaited.
    pub fn handle(&self) -> ProcessHandle {
        self.handle.clone()
    }

    /// The next event, or `None` after the last. Not reading slows the process down. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            let Some(message) = self.messages.next::<EventResponse>().await? else {
                return Ok(None);
            };
            match message.event {
                ProcessEvent::Data(DataEvent::Stdout(bytes) | DataEvent::Pty(bytes)) => {
                    return Ok(Some(Event::Stdout(bytes.into())));
                }
                ProcessEvent::Data(DataEvent::Stderr(bytes)) => {
                    return Ok(Some(Event::Stderr(bytes.into())));
                }
                ProcessEvent::End(end) => {
                    let code = match end.signal {
                        Some(signal) => 128_i32.saturating_add(signal),
                        None => end.exit_code,
                    };
                    let exit = Exit {
                        code,
                        signal: end.signal,
                        timed_out: end.timed_out,
                    };
                    return Ok(Some(Event::Exit(exit)));
                }
                ProcessEvent::Start(_) | ProcessEvent::Keepalive(_) => {}
            }
        }
    }

    /// Waits for the end and collects what is written until then.
    pub async fn collect(&mut self) -> Result<Output, Error> {
        let mut output = Output::default();
        while let Some(event) = self.next().await? {
            match event {
                Event::Stdout(bytes) => output.truncated |= keep(&mut output.stdout, &bytes),
                Event::Stderr(bytes) => output.truncated |= keep(&mut output.stderr, &bytes),
                Event::Exit(exit) => {
                    output.exit_code = exit.code;
                    output.signal = exit.signal;
                    output.timed_out = exit.timed_out;
                    return Ok(output);
                }
            }
        }
        Err(Error::protocol("exec", "it ends without the process's end"))
    }

    /// The events as a stream; it ends after the first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Event, Error>> + Send {
        futures_util::stream::unfold(Some(self), async |exec| {
            let mut exec = exec?;
            match exec.next().await {
                Ok(Some(event)) => Some((Ok(event), Some(exec))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}

impl ProcessHandle {
    /// The process's id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn selector(&self) -> ProcessSelector {
        ProcessSelector::Pid(self.pid)
    }

    /// Writes to its standard input. Returns when the process's pipe has taken it, however long the
    /// process does not read: the caller bounds it, by dropping.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        self.input(bytes, ProcessInput::Stdin).await
    }

    /// Writes to its terminal.
    pub async fn write_terminal(&self, bytes: &[u8]) -> Result<(), Error> {
        self.input(bytes, ProcessInput::Pty).await
    }

    async fn input(
        &self,
        bytes: &[u8],
        kind: impl Fn(Vec<u8>) -> ProcessInput,
    ) -> Result<(), Error> {
        for chunk in bytes.chunks(INPUT_CHUNK) {
            let message = SendInputRequest {
                process: self.selector(),
                input: kind(chunk.to_vec()),
            };
            let request = rpc::unary_request("stdin", SEND_INPUT_PATH, &message)?;
            rpc::unary::<KeepAlive>(&self.client, "stdin", request, Duration::MAX).await?;
        }
        Ok(())
    }

    /// Ends its standard input.
    pub async fn close_stdin(&self) -> Result<(), Error> {
        let message = SelectRequest {
            process: self.selector(),
        };
        self.control("close stdin", CLOSE_STDIN_PATH, &message)
            .await
    }

    /// Sends a signal to its process group.
    pub async fn signal(&self, number: i32) -> Result<(), Error> {
        let message = SendSignalRequest {
            process: self.selector(),
            signal: Signal(number),
        };
        self.control("signal", SEND_SIGNAL_PATH, &message).await
    }

    /// Kills its process group.
    pub async fn kill(&self) -> Result<(), Error> {
        self.signal(9).await
    }

    /// Changes the size of its terminal.
    pub async fn resize(&self, size: PtySize) -> Result<(), Error> {
        let message = UpdateRequest {
            process: self.selector(),
            pty: Some(Pty { size }),
        };
        self.control("resize", UPDATE_PATH, &message).await
    }

    async fn control<Q: serde::Serialize>(
        &self,
        what: &'static str,
        path: &'static str,
        message: &Q,
    ) -> Result<(), Error> {
        self.client
            .call::<_, KeepAlive>(what, path, message, CONTROL_LIMIT)
            .await?;
        Ok(())
    }
}
