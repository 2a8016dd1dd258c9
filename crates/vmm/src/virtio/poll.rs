//! A set of host descriptors a device watches, seen from outside as one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

/// Most events taken in one round of asking.
const ROUND: usize = 64;

/// An epoll instance of the device's own, so that vCPU threads may change it under the device's
/// lock while the event loop waits for it.
#[derive(Debug)]
pub struct Poller(OwnedFd);

impl AsFd for Poller {
    /// Readable while something of the set is ready.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Poller {
    /// Makes an empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches for changes in what can be read or written: a descriptor that stays ready is
    /// reported once, under `token`.
    pub fn watch(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    /// Stops watching. A descriptor that is not watched is no error.
    pub fn forget(&self, fd: impl AsFd) {
        epoll::delete(&self.0, fd).ok();
    }

    /// The tokens of what changed since the last call; does not wait.
    pub fn take(&self) -> Vec<u64> {
        let mut tokens = Vec::new();
        let now = Timespec::default();
        let mut events: Vec<epoll::Event> = Vec::with_capacity(ROUND);
        loop {
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            // Interrupted or not: what is not taken now is reported by the next call.
            if epoll::wait(&self.0, spare, Some(&now)).is_err() {
                return tokens;
            }
            tokens.extend(events.iter().map(|event| event.data.u64()));
            if events.len() < ROUND {
                return tokens;
            }
        }
    }
}
