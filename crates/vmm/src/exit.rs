//! How a machine ends: the first reason given wins, and wakes the main thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use forkd_wire::vmm::Exit;
use rustix::event::EventfdFlags;

use crate::bus::lock;

#[derive(Debug)]
struct Inner {
    event: OwnedFd,
    reason: Mutex<Option<(Exit, String)>>,
}

/// Shared by vCPU threads, devices (power, reset) and the main loop.
#[derive(Debug, Clone)]
pub struct ExitEvent(Arc<Inner>);

impl ExitEvent {
    /// An event that has not happened.
    pub fn new() -> std::io::Result<ExitEvent> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = rustix::event::eventfd(0, flags)?;
        Ok(ExitEvent(Arc::new(Inner {
            event,
            reason: Mutex::new(None),
        })))
    }

    /// Ends the machine. Later calls change nothing.
    pub fn end(&self, exit: Exit, message: String) {
        lock(&self.0.reason).get_or_insert((exit, message));
        _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    /// Why the machine ended, if it did.
    pub fn reason(&self) -> Option<(Exit, String)> {
        lock(&self.0.reason).clone()
    }
}

impl AsFd for ExitEvent {
    /// Readable once the machine has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}
