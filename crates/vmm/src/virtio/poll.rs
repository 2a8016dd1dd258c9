//! A set of host descriptors a device watches, seen from outside as one.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};

use rustix::event::{Timespec, epoll};

/// Most events taken in one round; more wait for the next.
const ROUND: usize = 64;

/// What to hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// Something can be read.
    pub read: bool,
    /// Something can be written.
    pub write: bool,
}

/// What happened to a watched descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Happened {
    /// The number given when it was watched.
    pub token: u64,
    /// Something can be read, or the other side is gone.
    pub read: bool,
    /// Something can be written, or the other side is gone.
    pub write: bool,
}

/// An epoll instance of the device's own, so that vCPU threads may change it under the device's
/// lock while the event loop waits for it.
#[derive(Debug)]
pub struct Poller(OwnedFd);

impl Poller {
    /// Makes an empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Readable while something of the set is ready.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Watches for changes only: a descriptor that stays ready is reported once.
    pub fn watch_changes(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    /// Watches for `interest` as long as it lasts.
    pub fn watch(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags(interest),
        )?)
    }

    /// Changes what is watched for.
    pub fn change(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags(interest),
        )?)
    }

    /// Stops watching. A descriptor that is not watched is no error.
    pub fn forget(&self, fd: impl AsFd) {
        epoll::delete(&self.0, fd).ok();
    }

    /// What happened since the last call; does not wait.
    pub fn take(&self) -> Vec<Happened> {
        let mut events = Vec::with_capacity(ROUND);
        let now = Timespec::default();
        let spare = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.0, spare, Some(&now)).is_err() {
            return Vec::new();
        }
        let gone = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        events
            .into_iter()
            .map(|event: epoll::Event| {
                let flags = event.flags;
                Happened {
                    token: event.data.u64(),
                    read: flags.intersects(epoll::EventFlags::IN | gone),
                    write: flags.intersects(epoll::EventFlags::OUT | gone),
                }
            })
            .collect()
    }
}

fn flags(interest: Interest) -> epoll::EventFlags {
    let mut flags = epoll::EventFlags::empty();
    flags.set(epoll::EventFlags::IN, interest.read);
    flags.set(epoll::EventFlags::OUT, interest.write);
    flags
}
