//! A command in a sandbox, streamed over the daemon's WebSocket.
//!
//! ```text
//!   input ─► sender task ─► socket ─► receiver ─► output, exit code
//!   signals ────►┘
//! ```
//!
//! Both directions are bounded: a guest that writes faster than anybody reads is slowed down by the
//! socket, and so is an input that is longer than the guest wants.

use std::io;
use std::time::Duration;

use forkd_wire::api::exec::{ClientMessage, Exec, ExecExit, STDERR, STDIN, STDOUT, ServerMessage};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use tokio::sync::mpsc;

use crate::client::{Client, Message, Receiver, Sender, from_body};
use crate::failure::Failure;

/// Bytes of standard input per message.
pub(crate) const CHUNK: usize = 32 * 1024;
/// Messages waiting for the socket; more input is not read before they are gone.
const OUTBOX: usize = 4;
/// How long an interrupted command may take to end by itself before it is killed.
const GRACE: Duration = Duration::from_secs(2);

/// One of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A command that was started.
#[derive(Debug)]
pub(crate) struct Process {
    input: Input,
    receiver: Receiver,
}

/// The way to the command: its standard input and signals.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    outbox: mpsc::Sender<Message>,
}

impl Process {
    /// Starts a command.
    pub(crate) async fn start(
        client: &Client,
        id: &SandboxId,
        request: Exec,
    ) -> Result<Self, Failure> {
        let socket = client
            .socket(&format!("/v1/sandboxes/{id}/exec/ws"))
            .await?;
        let (sender, receiver) = socket.split();
        let input = Input {
            outbox: send_in_background(sender),
        };
        input.say(&ClientMessage::Start(request)).await;
        Ok(Self { input, receiver })
    }

    /// The way to the command.
    pub(crate) fn input(&self) -> &Input {
        &self.input
    }

    /// Passes output on until the command has ended.
    pub(crate) async fn finish(
        &mut self,
        mut output: impl FnMut(Stream, &[u8]) -> Result<(), Failure>,
    ) -> Result<ExecExit, Failure> {
        while let Some(message) = self.receiver.next().await? {
            match message {
                Message::Binary(bytes) => match bytes.split_first() {
                    Some((&STDOUT, data)) => output(Stream::Out, data)?,
                    Some((&STDERR, data)) => output(Stream::Err, data)?,
                    _ => (),
                },
                Message::Text(text) => match serde_json::from_str(&text) {
                    Ok(ServerMessage::Started(_)) => (),
                    Ok(ServerMessage::Exit(ended)) => return Ok(ended),
                    Ok(ServerMessage::Error(body)) => return Err(from_body(body)),
                    Err(error) => return Err(misunderstood(&error)),
                },
                _ => (),
            }
        }
        Err(Failure::new("the daemon closed the stream before the command had ended")
            .with_code(ErrorCode::GuestUnreachable)
            .with_help(
                "`forkd ls` shows whether the sandbox still runs, `forkd logs` what it last said",
            ))
    }

    /// Asks the command to end, then makes it.
    pub(crate) async fn stop(mut self) {
        for signal in ["SIGINT", "SIGKILL"] {
            let message = ClientMessage::Signal {
                signal: signal.to_owned(),
            };
            // An outbox full of input that the guest does not read must not hold the signal up.
            let _ = tokio::time::timeout(GRACE, self.input.say(&message)).await;
            let ended = tokio::time::timeout(GRACE, self.finish(|_, _| Ok(()))).await;
            if ended.is_ok() {
                return;
            }
        }
    }
}

impl Input {
    async fn say(&self, message: &ClientMessage) {
        if let Some(message) = text(message) {
            // A closed outbox means a broken connection, which the receiving side tells.
            let _ = self.outbox.send(message).await;
        }
    }

    /// Ends the command's standard input.
    pub(crate) async fn close(&self) {
        self.say(&ClientMessage::CloseStdin).await;
    }

    /// A writer for a thread that may block. Dropping it does not end the input; [`Self::close`] and
    /// [`InputWriter::finish`] do.
    pub(crate) fn writer(&self) -> InputWriter {
        InputWriter {
            outbox: self.outbox.clone(),
        }
    }
}

/// Writes to the command's standard input, blocking.
#[derive(Debug)]
pub(crate) struct InputWriter {
    outbox: mpsc::Sender<Message>,
}

impl InputWriter {
    /// Ends the input.
    pub(crate) fn finish(self) {
        if let Some(message) = text(&ClientMessage::CloseStdin) {
            let _ = self.outbox.blocking_send(message);
        }
    }
}

impl io::Write for InputWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let len = data.len().min(CHUNK);
        let mut framed = Vec::with_capacity(len + 1);
        framed.push(STDIN);
        framed.extend_from_slice(&data[..len]);
        let sent = self.outbox.blocking_send(Message::binary(framed));
        sent.map(|()| len)
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn text(message: &ClientMessage) -> Option<Message> {
    // Our own type has only string keys; it always becomes JSON.
    serde_json::to_string(message).ok().map(Message::text)
}

/// Everything to be sent passes one task, so that a guest that does not read its input never keeps us
/// from reading its output.
fn send_in_background(mut sender: Sender) -> mpsc::Sender<Message> {
    let (outbox, mut waiting) = mpsc::channel::<Message>(OUTBOX);
    tokio::spawn(async move {
        while let Some(message) = waiting.recv().await {
            // A broken connection is told by the receiving side.
            if sender.send(message).await.is_err() {
                break;
            }
        }
    });
    outbox
}

fn misunderstood(error: &serde_json::Error) -> Failure {
    Failure::caused("the daemon said what nobody understands", error)
        .with_help("use the same version of forkd and of the daemon")
}
