//! What a process says, from its pipes to its subscribers, and how it ends.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use forkd_wire::agent::connect::{ENVELOPE, envelope};
use forkd_wire::agent::process::{EndEvent, EventResponse, ProcessEvent, Signal};
use rustix::process::WaitStatus;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Process;
use super::table::Table;
use crate::fd::Stream;
use crate::rpc;

/// Bytes read at once; a message carries them as base64.
const CHUNK: usize = 32 << 10;
/// After the process has ended: how long somebody else who holds its pipe is listened to.
const GRACE: Duration = Duration::from_millis(100);
/// And how many chunks of what he writes are passed on; more than any pipe holds by default.
const GRACE_CHUNKS: usize = 64;

/// Which stream bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Stdout,
    Stderr,
    Terminal,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Terminal => "pty",
        }
    }
}

/// The streams that have not ended.
#[derive(Debug)]
pub(crate) struct Outputs {
    open: Vec<(Source, Stream)>,
    /// Where to look first, so that a talkative stream does not silence the other.
    turn: usize,
}

impl Outputs {
    pub(crate) fn new(open: Vec<(Source, Stream)>) -> Self {
        Self { open, turn: 0 }
    }

    /// The next bytes of any stream; `None` when all have ended.
    fn poll_next(
        &mut self,
        terminal: Option<&Stream>,
        buf: &mut [u8],
        cx: &mut Context<'_>,
    ) -> Poll<Option<(Source, usize)>> {
        let mut tried = 0;
        while tried < self.open.len() {
            let at = (self.turn + tried) % self.open.len();
            let (source, stream) = &self.open[at];
            let source = *source;
            match stream.poll_read(cx, buf) {
                Poll::Ready(Ok(0) | Err(_)) => {
                    self.open.remove(at);
                    tried = 0;
                }
                Poll::Ready(Ok(read)) => {
                    self.turn = at + 1;
                    return Poll::Ready(Some((source, read)));
                }
                Poll::Pending => tried += 1,
            }
        }
        match terminal {
            Some(stream) => match stream.poll_read(cx, buf) {
                Poll::Ready(Ok(read)) if read > 0 => Poll::Ready(Some((Source::Terminal, read))),
                Poll::Ready(_) => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            },
            None if self.open.is_empty() => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

/// Passes on everything `process` says until it has ended, then says how.
pub(crate) async fn pump(
    process: Arc<Process>,
    mut outputs: Outputs,
    exit: oneshot::Receiver<WaitStatus>,
    table: Arc<Table>,
) {
    let mut exit = std::pin::pin!(exit);
    let mut buf = vec![0; CHUNK];
    let mut status = None;
    let mut talking = true;
    let mut grace_chunks = GRACE_CHUNKS;
    let mut deadline = Instant::now();
    while status.is_none() || (talking && grace_chunks > 0) {
        let terminal = process.terminal.as_ref();
        let next = std::future::poll_fn(|cx| outputs.poll_next(terminal, &mut buf, cx));
        tokio::select! {
            biased;
            said = next, if talking => match said {
                Some((source, len)) => {
                    process.deliver(data_message(source, &buf[..len])).await;
                    grace_chunks -= usize::from(status.is_some());
                }
                None => talking = false,
            },
            ended = &mut exit, if status.is_none() => {
                // The sender is dropped only with the whole agent.
                status = Some(ended.ok());
                deadline = Instant::now() + GRACE;
            }
            () = tokio::time::sleep_until(deadline), if status.is_some() => break,
        }
    }
    table.remove(&process);
    let timed_out = process.timed_out.load(Ordering::Relaxed);
    let end = end_event(status.flatten(), timed_out);
    let event = EventResponse {
        event: ProcessEvent::End(end),
    };
    process.deliver(rpc::message(&event, false)).await;
    process.deliver(rpc::end_stream()).await;
    // Ends every subscriber's stream.
    process
        .subscribers
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .clear();
}

/// A data event with its envelope. Output is the bulk of what the agent sends, so this is written by
/// hand, in one allocation.
pub(crate) fn data_message(source: Source, bytes: &[u8]) -> Bytes {
    const TAIL: &[u8] = br#""}}}"#;
    let mut message = Vec::with_capacity(ENVELOPE + 64 + bytes.len().div_ceil(3) * 4);
    message.extend_from_slice(&[0; ENVELOPE]);
    message.extend_from_slice(br#"{"event":{"data":{""#);
    message.extend_from_slice(source.name().as_bytes());
    message.extend_from_slice(br#"":""#);
    let start = message.len();
    message.resize(start + bytes.len().div_ceil(3) * 4, 0);
    // The room is exactly what padded base64 takes.
    let written = STANDARD
        .encode_slice(bytes, &mut message[start..])
        .unwrap_or(0);
    message.truncate(start + written);
    message.extend_from_slice(TAIL);
    let head = envelope(message.len() - ENVELOPE, false);
    message[..ENVELOPE].copy_from_slice(&head);
    message.into()
}

/// How a process ended, in the words of the protocol.
fn end_event(status: Option<WaitStatus>, timed_out: bool) -> EndEvent {
    let Some(status) = status.map(|status| ExitStatus::from_raw(status.as_raw())) else {
        return EndEvent {
            exit_code: -1,
            status: "lost".to_owned(),
            error: Some("the agent lost track of the process".to_owned()),
            ..EndEvent::default()
        };
    };
    match status.signal() {
        Some(number) => {
            let name = Signal(number).name().unwrap_or_else(|| number.to_string());
            EndEvent {
                exit_code: -1,
                exited: false,
                status: format!("signal: {name}"),
                error: Some(if timed_out {
                    "killed, because its time was up".to_owned()
                } else {
                    format!("ended by signal {name}")
                }),
                signal: Some(number),
                timed_out,
            }
        }
        None => {
            let code = status.code().unwrap_or(-1);
            EndEvent {
                exit_code: code,
                exited: true,
                status: format!("exit status {code}"),
                error: (code != 0).then(|| format!("exit status {code}")),
                signal: None,
                timed_out,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use forkd_wire::agent::process::DataEvent;

    use super::*;

    #[test]
    fn data_is_what_the_wire_types_read() {
        for len in 0..7 {
            let bytes: Vec<u8> = (250..=255).cycle().take(len).collect();
            let message = data_message(Source::Stderr, &bytes);
            let head = *message.first_chunk().unwrap();
            let (size, end) = forkd_wire::agent::connect::read_envelope(head).unwrap();
            assert_eq!((size, end), (message.len() - ENVELOPE, false));
            let read: EventResponse = serde_json::from_slice(&message[ENVELOPE..]).unwrap();
            assert_eq!(read.event, ProcessEvent::Data(DataEvent::Stderr(bytes)));
        }
    }
}
