//! The virtio-serial port, where there is no vsock.
//!
//! While nobody on the host has the port open, the kernel reports a permanent hang-up, which would
//! make a plain event loop spin. So the port is watched, edge by edge, by an epoll descriptor of its
//! own, and the runtime waits for that one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

const CLASS: &str = "/sys/class/virtio-ports";

/// Drivers that have at least one device.
const DRIVERS: &str = "/sys/bus/virtio/drivers";

/// Whether a driver of the virtio bus drives any device.
pub(crate) fn has_device(driver: &str) -> bool {
    let bound =
        |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("virtio");
    std::fs::read_dir(format!("{DRIVERS}/{driver}"))
        .is_ok_and(|entries| entries.flatten().any(bound))
}

/// The device of the port of this name, if the machine has one.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let by_name = PathBuf::from("/dev/virtio-ports").join(name);
    if by_name.exists() {
        return Some(by_name);
    }
    std::fs::read_dir(CLASS).ok()?.flatten().find_map(|entry| {
        let found = std::fs::read_to_string(entry.path().join("name")).ok()?;
        (found.trim() == name).then(|| PathBuf::from("/dev").join(entry.file_name()))
    })
}

/// The open port. A read of nothing says that the host has left; it may come back.
#[derive(Debug)]
pub(crate) struct Port {
    fd: OwnedFd,
    events: AsyncFd<OwnedFd>,
    /// The host was there when we last looked.
    connected: bool,
}

impl Port {
    pub(crate) fn open(path: &std::path::Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        let inner = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&inner, &fd, epoll::EventData::new_u64(0), edges)?;
        let events = crate::sys::async_fd(inner, Interest::READABLE)?;
        Ok(Self {
            fd,
            events,
            connected: false,
        })
    }

    /// Waits until something about the port has changed.
    fn poll_changed(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut guard = ready!(self.events.poll_read_ready(cx))?;
        let mut list = Vec::with_capacity(1);
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        epoll::wait(
            self.events.get_ref(),
            rustix::buffer::spare_capacity(&mut list),
            Some(&now),
        )?;
        if list.is_empty() {
            guard.clear_ready();
        }
        // Readers and writers share one edge, so whoever took it wakes the task for both.
        cx.waker().wake_by_ref();
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match rustix::io::read(&this.fd, buf.initialize_unfilled()) {
                Ok(0) if std::mem::take(&mut this.connected) => return Poll::Ready(Ok(())),
                Ok(0) | Err(Errno::AGAIN) => ready!(this.poll_changed(cx))?,
                Ok(read) => {
                    this.connected = true;
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            match rustix::io::write(&this.fd, bytes) {
                Err(Errno::AGAIN) => ready!(this.poll_changed(cx))?,
                Err(Errno::INTR) => {}
                done => return Poll::Ready(done.map_err(Into::into)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
