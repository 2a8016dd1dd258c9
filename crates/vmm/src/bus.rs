//! What a device looks like to the machine, and how guest accesses find it.
//!
//! A vCPU thread that leaves the guest with a port or MMIO access looks the address up in a [`Bus`]
//! and calls the device under its lock. Everything slower than a register access belongs to the
//! main thread: a device that needs it has its descriptors watched (`virtio::poll`) by the one event
//! loop of the process.
//!
//! Across a fork only memory survives: file descriptors registered with an epoll instance, threads
//! and KVM handles do not. So a device is *saved* into plain serialisable data (`save`), and in the
//! child *constructed again* from that data and fresh handles (`restore(state, args)`).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device reached by memory-mapped or port accesses of the guest.
///
/// `offset` is relative to the start of the device's range. `data` holds 1, 2, 4 or 8 bytes in guest
/// byte order. Neither method may panic, block, or allocate in proportion to what the guest wrote.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads. Bytes it leaves alone read as `0xff`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// An edge-triggered interrupt into the guest.
///
/// Cheap to call from any thread; an interrupt that cannot be delivered (the VM is being torn down)
/// is dropped, because no device could do better.
pub trait IrqLine: Send + Sync + fmt::Debug {
    /// Delivers one edge.
    fn raise(&self);
}

/// An interrupt line that goes nowhere, counting its edges: for tests and fuzzing.
#[derive(Debug, Default)]
pub struct CountingIrq(std::sync::atomic::AtomicU64);

impl CountingIrq {
    /// How often the line was raised.
    pub fn count(&self) -> u64 {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl IrqLine for CountingIrq {
    fn raise(&self) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A range of addresses, `[base, base + len)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Bytes; never zero.
    pub len: u64,
}

impl Range {
    fn end(self) -> Option<u64> {
        self.base.checked_add(self.len)
    }

    fn overlaps(self, other: Range) -> bool {
        self.base < other.base + other.len && other.base < self.base + self.len
    }
}

/// A device could not be put on the bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The range is empty or runs past the end of the address space.
    #[error("device range {:#x}+{:#x} is not a range", .0.base, .0.len)]
    BadRange(Range),
    /// Two devices claim the same address.
    #[error("device range {:#x}+{:#x} overlaps another device", .0.base, .0.len)]
    Overlap(Range),
}

/// A shared device: the bus, the event loop and `save` all hold one.
pub type Shared<T> = Arc<Mutex<T>>;

/// Locks a shared device. A device whose thread panicked is still the guest's device; the process is
/// about to end in that case and the state is only read.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Finds devices by address. Built once, then only read: vCPU threads share it without a lock.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, ranges disjoint.
    entries: Vec<(Range, Shared<dyn BusDevice>)>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.entries.iter().map(|(range, _)| range))
            .finish()
    }
}

impl Bus {
    /// Puts a device at `range`.
    pub fn insert(&mut self, range: Range, device: Shared<dyn BusDevice>) -> Result<(), Error> {
        if range.len == 0 || range.end().is_none() {
            return Err(Error::BadRange(range));
        }
        if self.entries.iter().any(|(other, _)| other.overlaps(range)) {
            return Err(Error::Overlap(range));
        }
        let at = self
            .entries
            .partition_point(|(other, _)| other.base < range.base);
        self.entries.insert(at, (range, device));
        Ok(())
    }

    /// A guest read. Unclaimed addresses, and accesses that straddle the end of a device, read as
    /// all ones, as an empty bus does. Returns whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// A guest write. Unclaimed addresses swallow it. Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice + 'static>)> {
        let after = self
            .entries
            .partition_point(|(range, _)| range.base <= address);
        let (range, device) = &self.entries[after.checked_sub(1)?];
        let offset = address - range.base;
        let fits = offset.checked_add(len as u64)? <= range.len;
        fits.then_some((offset, &**device))
    }
}

#[cfg(test)]
mod tests;
