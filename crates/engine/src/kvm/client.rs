//! A control socket of the monitor: requests with their answers, and what was told unasked.
//!
//! Packets are in `forkd_wire::vmm`. Requests may overlap; each answer bears the number of its request.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use forkd_wire::vmm::{Exit, FDS_MAX, Failure, PACKET_MAX, Reply, Request};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

/// Why a request has no answer.
#[derive(Debug)]
pub(super) enum Error {
    /// The process has closed the socket.
    Closed,
    /// The process refused or failed.
    Refused(Failure),
    /// The process did not answer in time.
    Late,
}

/// What the process told unasked.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// A template can be forked.
    pub(super) ready: Option<Ready>,
    /// A VM is about to run, or waits paused.
    pub(super) running: bool,
    /// It cannot start.
    pub(super) failed: Option<Failure>,
    /// The VM ends by itself.
    pub(super) exiting: Option<(Exit, String)>,
    /// What the built-in test guest reported.
    #[cfg(test)]
    pub(super) reports: Vec<u64>,
    /// The socket is closed: nothing more will be told.
    pub(super) closed: bool,
}

/// What a template says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) memory_mib: u32,
    pub(super) vcpus: u32,
    /// Whether children may be given a user and a cgroup.
    pub(super) privileged: bool,
}

type Answer = Result<Reply, Failure>;
type Waiting = Mutex<HashMap<u32, oneshot::Sender<Answer>>>;

/// A control socket. Dropped, it is closed.
#[derive(Debug)]
pub(super) struct Client {
    socket: Arc<AsyncFd<OwnedFd>>,
    waiting: Arc<Waiting>,
    seen: watch::Receiver<Seen>,
    next: AtomicU32,
    _reader: AbortOnDropHandle<()>,
}

/// A connected pair of sockets.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(rustix::net::socketpair(
        family,
        kind,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

impl Client {
    /// Takes this end of a socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Client> {
        let both = Interest::READABLE | Interest::WRITABLE;
        let socket = Arc::new(crate::fd::watched(socket, both)?);
        let waiting = Arc::new(Waiting::default());
        let (tell, seen) = watch::channel(Seen::default());
        let (from, answers) = (Arc::clone(&socket), Arc::clone(&waiting));
        let reader = tokio::spawn(async move {
            if let Err(error) = read(&from, &answers, &tell).await {
                tracing::debug!(%error, "control socket failed");
            }
            // Whoever waits for an answer learns that none will come.
            lock(&answers).clear();
            tell.send_modify(|seen| seen.closed = true);
        });
        Ok(Client {
            socket,
            waiting,
            seen,
            next: AtomicU32::new(1),
            _reader: AbortOnDropHandle::new(reader),
        })
    }

    /// What was told unasked, to be watched.
    pub(super) fn seen(&self) -> watch::Receiver<Seen> {
        self.seen.clone()
    }

    /// Asks, and waits for the answer no longer than this.
    pub(super) async fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Reply, Error> {
        match tokio::time::timeout(limit, self.exchange(request, fds)).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::Late),
        }
    }

    /// Asks, and waits for the answer.
    pub(super) async fn exchange(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, Error> {
        let seq = self.number();
        let (tell, answer) = oneshot::channel();
        lock(&self.waiting).insert(seq, tell);
        let _forget = Forget(&self.waiting, seq);
        // Afterwards the reader clears what is waited for; before, it is seen here.
        if self.seen.borrow().closed {
            return Err(Error::Closed);
        }
        let packet = request.encode(seq);
        let sent = self.socket.async_io(Interest::WRITABLE, |socket| {
            send(socket.as_fd(), &packet, fds)
        });
        sent.await.map_err(|_| Error::Closed)?;
        match answer.await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(failure)) => Err(Error::Refused(failure)),
            Err(_) => Err(Error::Closed),
        }
    }

    #[cfg(test)]
    pub(super) fn hang_up(&self) {
        let both = rustix::net::Shutdown::Both;
        rustix::net::shutdown(self.socket.get_ref(), both).unwrap();
    }

    /// 0 is that of events.
    fn number(&self) -> u32 {
        loop {
            let seq = self.next.fetch_add(1, Ordering::Relaxed);
            if seq != 0 {
                return seq;
            }
        }
    }
}

/// Nobody waits for this answer any more.
struct Forget<'a>(&'a Waiting, u32);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.0).remove(&self.1);
    }
}

fn lock(waiting: &Waiting) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Answer>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(socket: BorrowedFd<'_>, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags)?;
    Ok(())
}

async fn read(
    socket: &AsyncFd<OwnedFd>,
    waiting: &Waiting,
    tell: &watch::Sender<Seen>,
) -> io::Result<()> {
    loop {
        let received = socket.async_io(Interest::READABLE, |socket| receive(socket.as_fd()));
        let Some(packet) = received.await? else {
            return Ok(());
        };
        let decoded = Reply::decode(&packet);
        let (seq, reply) = decoded.map_err(|error| io::Error::other(error.to_string()))?;
        match (seq, reply) {
            (0, event) => tell.send_modify(|seen| note(seen, event)),
            (seq, reply) => {
                let answer = match reply {
                    Reply::Error(failure) => Err(failure),
                    reply => Ok(reply),
                };
                if let Some(wants) = lock(waiting).remove(&seq) {
                    // Gone in this very moment: then nobody wants it.
                    let _ = wants.send(answer);
                }
            }
        }
    }
}

fn note(seen: &mut Seen, event: Reply) {
    match event {
        Reply::Ready {
            memory_mib,
            vcpus,
            privileged,
            ..
        } => {
            seen.ready = Some(Ready {
                memory_mib,
                vcpus,
                privileged,
            });
        }
        Reply::Running(_) => seen.running = true,
        Reply::Failed(failure) => seen.failed = Some(failure),
        Reply::Exiting { exit, message } => seen.exiting = Some((exit, message)),
        #[cfg(test)]
        Reply::Report(value) => seen.reports.push(value),
        Reply::Error(failure) => tracing::debug!(failure.message, "the monitor complains"),
        _ => {}
    }
}

/// One packet; `None` at the end. Descriptors beside it are closed: processes are children of this one
/// and found by their pid.
fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let peek = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
    let length = loop {
        match rustix::net::recv(socket, &mut [0_u8; 1][..], peek) {
            Ok((_, length)) => break length.clamp(1, PACKET_MAX),
            // It died with unread packets. That is told once; what it had said before is still there, then the end.
            Err(Errno::CONNRESET) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut bytes = vec![0; length];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut into = [IoSliceMut::new(&mut bytes)];
    let received = loop {
        match rustix::net::recvmsg(socket, &mut into, &mut control, flags) {
            Err(Errno::CONNRESET) => {}
            received => break received?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            rights.for_each(drop);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::other("a packet was cut off"));
    }
    bytes.truncate(received.bytes);
    Ok((received.bytes > 0).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn last_words_of_a_monitor_that_died_with_unread_requests_are_heard() {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::send(&ours, b"a request", SendFlags::empty()).unwrap();
        rustix::net::send(&theirs, b"first", SendFlags::empty()).unwrap();
        rustix::net::send(&theirs, b"last", SendFlags::empty()).unwrap();
        // The request is never read: the connection is reset.
        drop(theirs);
        for expected in [Some(b"first".to_vec()), Some(b"last".to_vec()), None, None] {
            assert_eq!(receive(ours.as_fd()).unwrap(), expected);
        }
    }
}
