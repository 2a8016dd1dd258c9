//! A connection to QEMU's control socket. Only moves bytes; what they mean is in `request`.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc, watch};

use super::request::{Command, Event, Message, Shutdown, parse};

/// The longest line that is read.
const LINE_MAX: u64 = 1 << 20;
/// Answers nobody waits for any more; each command has one, and commands go one at a time.
const REPLIES: usize = 16;

/// Why a command has no result.
#[derive(Debug)]
pub(super) enum Error {
    /// QEMU closed the connection.
    Closed,
    /// QEMU refused, in its words.
    Refused(String),
    /// QEMU did not answer within the command's deadline.
    Late,
}

/// What events have told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Whether the vCPUs run, as far as events told.
    pub(super) running: Option<bool>,
    /// Why QEMU leaves.
    pub(super) shutdown: Option<Shutdown>,
    /// The connection has ended.
    pub(super) closed: bool,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Client {
    requests: Mutex<Requests>,
    seen: watch::Receiver<Seen>,
}

#[derive(Debug)]
struct Requests {
    writer: OwnedWriteHalf,
    replies: mpsc::Receiver<(u64, Result<Value, String>)>,
    last_id: u64,
}

impl Client {
    /// Takes a connection, of which nothing has been read. Nothing is sent yet.
    pub(super) fn new(stream: UnixStream) -> Client {
        let (reader, writer) = stream.into_split();
        let (reply, replies) = mpsc::channel(REPLIES);
        let (tell, seen) = watch::channel(Seen::default());
        tokio::spawn(async move {
            if let Err(error) = read(reader, &reply, &tell).await {
                tracing::debug!(%error, "control connection failed");
            }
            tell.send_modify(|seen| seen.closed = true);
        });
        let requests = Requests {
            writer,
            replies,
            last_id: 0,
        };
        Client {
            requests: Mutex::new(requests),
            seen,
        }
    }

    /// Sends a command, and a file with it, and waits for its answer, no longer than its deadline.
    pub(super) async fn command(
        &self,
        command: &Command,
        file: Option<&File>,
    ) -> Result<Value, Error> {
        let exchange = async {
            let mut requests = self.requests.lock().await;
            requests.exchange(command, file).await
        };
        match tokio::time::timeout(command.deadline(), exchange).await {
            Ok(result) => result,
            Err(_) => Err(Error::Late),
        }
    }

    /// What events have told, to be watched.
    pub(super) fn seen(&self) -> watch::Receiver<Seen> {
        self.seen.clone()
    }
}

impl Requests {
    async fn exchange(&mut self, command: &Command, file: Option<&File>) -> Result<Value, Error> {
        self.last_id += 1;
        let line = command.encode(self.last_id);
        let sent = match file {
            Some(file) => send_with(self.writer.as_ref(), &line, file).await,
            None => Ok(0),
        };
        let sent = sent.map_err(|_| Error::Closed)?;
        if self.writer.write_all(&line[sent..]).await.is_err() {
            return Err(Error::Closed);
        }
        loop {
            let (id, result) = self.replies.recv().await.ok_or(Error::Closed)?;
            // An older number answers a command that nobody waits for any more.
            if id == self.last_id {
                return result.map_err(Error::Refused);
            }
        }
    }
}

/// Sends a file along with the first bytes of a line. Answers how many those were.
async fn send_with(stream: &UnixStream, line: &[u8], file: &File) -> io::Result<usize> {
    let send = || {
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = [IoSlice::new(line)];
        let flags = SendFlags::NOSIGNAL;
        Ok(rustix::net::sendmsg(stream, &bytes, &mut control, flags)?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}

async fn read(
    reader: OwnedReadHalf,
    reply: &mpsc::Sender<(u64, Result<Value, String>)>,
    tell: &watch::Sender<Seen>,
) -> io::Result<()> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut bounded = (&mut reader).take(LINE_MAX);
        if bounded.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        match parse(&line) {
            Some(Message::Reply { id, result }) => {
                if reply.send((id, result)).await.is_err() {
                    return Ok(());
                }
            }
            Some(Message::Event(event)) => tell.send_modify(|seen| note(seen, event)),
            Some(Message::Greeting) => {}
            None => return Err(io::Error::other("not understood")),
        }
    }
}

fn note(seen: &mut Seen, event: Event) {
    match event {
        Event::Stopped => seen.running = Some(false),
        Event::Resumed => seen.running = Some(true),
        Event::Shutdown(reason) => seen.shutdown = Some(reason),
        Event::Other => {}
    }
}
