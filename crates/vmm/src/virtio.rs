//! The virtio-mmio transport and checked queues, shared by every virtio device.
//!
//! ```text
//!   vCPU exit ──► Bus ──► mmio::Transport<D> ──► D::process(queue)      the driver notified
//!   event loop ─────────► mmio::Transport<D> ──► D::ready()             a host descriptor is ready
//!                              │
//!                              ├─ Queues   rings in guest memory, every index and length checked
//!                              └─ IrqLine  one edge when the driver wants to hear of it
//! ```
//!
//! A notification is served by the vCPU thread that made it, under the device's lock. So a machine
//! whose vCPUs are parked has no request under way, which is what makes a branch consistent, and no
//! eventfd or extra thread is needed per device.
//!
//! The guest is never trusted. What it may do wrong ends in one of three ways: the request fails,
//! the chain is given back unused, or, when the ring itself makes no sense, the device asks to be
//! reset and does nothing until then.

pub mod mmio;
pub mod persist;
pub mod poll;
pub mod queue;

use std::os::fd::BorrowedFd;

pub use mmio::Transport;
pub use queue::{Chain, Queues};

/// What makes a transport a disk, a network card or a socket.
pub trait Device: Send + std::fmt::Debug {
    /// Device type of the virtio specification.
    fn kind(&self) -> u32;

    /// Largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &'static [u16];

    /// Feature bits of the device type offered to the driver.
    fn features(&self) -> u64;

    /// The driver is ready; `features` is what it accepted of the offer.
    fn activate(&mut self, features: u64);

    /// The driver starts anew: forget everything it said.
    fn reset(&mut self);

    /// Configuration space, at most a few dozen bytes.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver notified `queue`, or buffers may be waiting in it.
    fn process(&mut self, queue: usize, queues: &mut Queues);

    /// A descriptor that is readable when [`Device::ready`] should be called.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Something may have happened on the host's side.
    fn ready(&mut self, _queues: &mut Queues) {}
}

/// Device types.
pub mod kind {
    /// Network card.
    pub const NET: u32 = 1;
    /// Disk.
    pub const BLOCK: u32 = 2;
    /// Source of entropy.
    pub const RNG: u32 = 4;
    /// Sockets between guest and host.
    pub const VSOCK: u32 = 19;
}

/// A saved device does not fit this machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The state was saved by a device with other queues.
    #[error("the saved device has {found} queues, this one has {expected}")]
    QueueCount {
        /// Queues in the state.
        found: usize,
        /// Queues of the device.
        expected: usize,
    },
    /// A queue of the state is impossible.
    #[error("queue {index} of the saved device is invalid: {reason}")]
    Queue {
        /// Which queue.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The driver had accepted features this device does not offer.
    #[error("the saved device uses features {missing:#x} that this version does not offer")]
    Features {
        /// The bits.
        missing: u64,
    },
}

#[cfg(test)]
pub(crate) mod tests;
