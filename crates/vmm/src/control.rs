//! Packets and descriptors over the control socket. Knows the transport, not what the messages do.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use forkd_wire::vmm::{FDS_MAX, Failure, PACKET_MAX, Reply, Request};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Why the control socket failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Sending failed.
    #[error("cannot send on the control socket")]
    Send(#[source] io::Error),
    /// Receiving failed.
    #[error("cannot receive on the control socket")]
    Receive(#[source] io::Error),
    /// A packet or its descriptors did not fit.
    #[error("a control message was cut off: at most {PACKET_MAX} bytes and {FDS_MAX} descriptors")]
    Cut,
    /// What came is no message.
    #[error(transparent)]
    Malformed(#[from] forkd_wire::vmm::Error),
}

/// One end of a control socket pair.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

/// A packet that came in.
#[derive(Debug)]
pub struct Packet {
    /// The message.
    pub bytes: Vec<u8>,
    /// The descriptors beside it.
    pub fds: Vec<OwnedFd>,
}

/// What a packet brings: its sequence number, the message and the descriptors beside it.
pub type Message<T> = (u32, T, Vec<OwnedFd>);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Channel {
        Channel { fd }
    }
}

impl Channel {
    /// A connected pair.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType};
        let (a, b) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Channel { fd: a }, Channel { fd: b }))
    }

    /// The descriptor itself.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends one packet, waiting while the other end is behind.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Error::Cut);
        }
        let packet = [IoSlice::new(bytes)];
        loop {
            match rustix::net::sendmsg(&self.fd, &packet, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::Send(e.into())),
            }
        }
    }

    /// Waits for one packet; `None` when the other end is gone.
    pub fn receive(&self) -> Result<Option<Packet>, Error> {
        self.receive_with(RecvFlags::empty())
    }

    fn receive_with(&self, flags: RecvFlags) -> Result<Option<Packet>, Error> {
        // Sized by the packet: a sandbox that idles should not hold pages for the largest one.
        let mut bytes = vec![0; self.next_length()?];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let mut into = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.fd, &mut into, &mut control, flags) {
                Err(rustix::io::Errno::INTR) => {}
                // A peer that died with unread packets resets the connection. That is told once; what it
                // had said before is still there, and then the end.
                Err(rustix::io::Errno::CONNRESET) => {}
                received => break received.map_err(|e| Error::Receive(e.into()))?,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        use rustix::net::ReturnFlags;
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(Error::Cut);
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        bytes.truncate(received.bytes);
        Ok(Some(Packet { bytes, fds }))
    }

    /// Bytes of the packet at the front of the queue, at most what is allowed.
    fn next_length(&self) -> Result<usize, Error> {
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
        loop {
            match rustix::net::recv(&self.fd, &mut [0u8; 1][..], flags) {
                Ok((_, length)) => return Ok(length.clamp(1, PACKET_MAX)),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNRESET) => {}
                Err(e) => return Err(Error::Receive(e.into())),
            }
        }
    }

    /// Sends a request with its descriptors.
    pub fn request(
        &self,
        seq: u32,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.send(&request.encode(seq), fds)
    }

    /// Sends a reply (or, with sequence number 0, an event).
    pub fn reply(&self, seq: u32, reply: &Reply, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send(&reply.encode(seq), fds)
    }

    /// Waits for a request; `None` when the controller is gone. A malformed packet is answered with
    /// an error and skipped: it cannot harm anybody but its sender.
    pub fn next_request(&self) -> Result<Option<Message<Request>>, Error> {
        loop {
            let Some(packet) = self.receive()? else {
                return Ok(None);
            };
            match Request::decode(&packet.bytes) {
                Ok((seq, request)) => return Ok(Some((seq, request, packet.fds))),
                Err(e) => {
                    let message = e.to_string();
                    let errno = libc::EBADMSG as u32;
                    self.reply(0, &Reply::Error(Failure { errno, message }), &[])?;
                }
            }
        }
    }

    /// Waits for a reply; `None` when the other end is gone.
    pub fn next_reply(&self) -> Result<Option<Message<Reply>>, Error> {
        let Some(packet) = self.receive()? else {
            return Ok(None);
        };
        let (seq, reply) = Reply::decode(&packet.bytes)?;
        Ok(Some((seq, reply, packet.fds)))
    }
}

/// An error chain as a [`Failure`]: every message of the chain, and the errno at its end.
pub fn failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    let mut message = error.to_string();
    let mut errno = 0;
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<io::Error>() {
            errno = io.raw_os_error().unwrap_or(0).unsigned_abs();
        }
        cause = current.source();
        if let Some(source) = cause {
            message = format!("{message}: {source}");
        }
    }
    Failure { errno, message }
}

#[cfg(test)]
mod tests;
