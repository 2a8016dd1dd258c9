//! Pipes and terminals as async streams.

use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A file descriptor that can be waited for: a pipe's end, a terminal's master, a socket.
#[derive(Debug)]
pub(crate) struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Takes a pipe's reading end.
    pub(crate) fn reader(fd: OwnedFd) -> io::Result<Self> {
        Self::with_interest(fd, Interest::READABLE)
    }

    /// Takes a pipe's writing end.
    pub(crate) fn writer(fd: OwnedFd) -> io::Result<Self> {
        Self::with_interest(fd, Interest::WRITABLE)
    }

    /// Takes a terminal's master or a socket.
    pub(crate) fn duplex(fd: OwnedFd) -> io::Result<Self> {
        Self::with_interest(fd, Interest::READABLE | Interest::WRITABLE)
    }

    fn with_interest(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(crate::sys::async_fd(fd, interest)?))
    }

    /// The descriptor itself.
    pub(crate) fn fd(&self) -> &OwnedFd {
        self.0.get_ref()
    }

    /// Reads some bytes; 0 is the end. A terminal whose other side is closed has ended.
    pub(crate) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let done = guard.try_io(|fd| match rustix::io::read(fd, &mut *buf) {
                Err(rustix::io::Errno::IO) => Ok(0),
                other => Ok(other?),
            });
            if let Ok(result) = done {
                return Poll::Ready(result);
            }
        }
    }

    /// Reads some bytes; 0 is the end.
    pub(crate) async fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_read(cx, buf)).await
    }

    /// Reads what is there right now into `buf`; `None` when that is nothing.
    pub(crate) fn try_read(&self, buf: &mut [u8]) -> Option<usize> {
        rustix::io::read(self.0.get_ref(), buf).ok()
    }

    /// Reads exactly as much as `buf` holds.
    pub(crate) async fn read_exact(&self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.read(buf).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => buf = &mut buf[read..],
            }
        }
        Ok(())
    }

    /// Writes everything.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |fd: &OwnedFd| Ok(rustix::io::write(fd, bytes)?);
            let written = self.0.async_io(Interest::WRITABLE, write).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }
}
