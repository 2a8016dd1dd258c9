//! A guest's driver made by hand, for tests and fuzz targets: it lays out rings in guest memory and
//! talks to the registers as the specification asks. What goes into the rings is up to the caller.

#![allow(clippy::unwrap_used, reason = "only tests and fuzz targets call this")]
#![allow(missing_docs, reason = "only tests and fuzz targets call this")]

use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::bus::BusDevice as _;
use crate::virtio::{Device, Transport};

/// Bytes of guest memory.
pub const MEMORY: usize = 4 << 20;
const RINGS: u64 = 0x1000;
const RING_LEN: u64 = 0x4000;
const BUFFERS: u64 = 0x4_0000;

/// Memory for a device under test.
pub fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap())
}

/// One buffer of a request.
#[derive(Debug, Clone)]
pub enum Part {
    /// Bytes for the device.
    Readable(Vec<u8>),
    /// Room for the device's bytes.
    Writable(u32),
}

/// A driver and the device it drives.
#[derive(Debug)]
pub struct Driver<D: Device> {
    pub transport: Transport<D>,
    pub memory: Arc<GuestMemoryMmap>,
    offered: Vec<u16>,
    taken: Vec<u16>,
    next_descriptor: Vec<u16>,
    next_buffer: u64,
}

impl<D: Device> Driver<D> {
    /// Resets and starts the device with `features` and all queues.
    pub fn start(transport: Transport<D>, features: u64) -> Self {
        let transport = Self::start_with_rings_at(transport, features, RINGS);
        assert!(transport.is_active());
        Self::attach(transport)
    }

    /// Drives a device that was started by [`Driver::start`] in the same memory, or restored.
    pub fn attach(transport: Transport<D>) -> Self {
        let queues = transport.device().queue_sizes().len();
        Self {
            memory: transport.memory().clone(),
            transport,
            offered: vec![0; queues],
            taken: vec![0; queues],
            next_descriptor: vec![0; queues],
            next_buffer: BUFFERS,
        }
    }

    pub fn start_with_rings_at(
        mut transport: Transport<D>,
        features: u64,
        base: u64,
    ) -> Transport<D> {
        let zeros = vec![0; (BUFFERS - RINGS) as usize];
        transport
            .memory()
            .clone()
            .write_slice(&zeros, GuestAddress(RINGS))
            .unwrap();
        let sizes = transport.device().queue_sizes();
        let mut write = |offset: u64, value: u32| transport.write(offset, &value.to_le_bytes());
        for status in [0, 1, 3] {
            write(0x70, status);
        }
        write(0x24, 0);
        write(0x20, features as u32);
        write(0x24, 1);
        write(0x20, (features >> 32) as u32 | 1);
        write(0x70, 0xb);
        for (index, size) in (0..).zip(sizes) {
            write(0x30, index);
            write(0x38, u32::from(*size));
            let ring = base + u64::from(index) * RING_LEN;
            for (offset, address) in [(0x80, ring), (0x90, ring + AVAIL), (0xa0, ring + USED)] {
                write(offset, address as u32);
                write(offset + 4, (address >> 32) as u32);
            }
            write(0x44, 1);
        }
        write(0x70, 0xf);
        transport
    }

    fn ring(&self, queue: usize) -> u64 {
        RINGS + queue as u64 * RING_LEN
    }

    /// Guest address of the ring of available requests.
    pub fn avail(&self, queue: usize) -> u64 {
        self.ring(queue) + AVAIL
    }

    fn size(&self, queue: usize) -> u16 {
        self.transport.device().queue_sizes()[queue]
    }

    /// Puts a request into the ring and returns the guest addresses of its parts.
    pub fn offer(&mut self, queue: usize, parts: &[Part]) -> Vec<u64> {
        let size = self.size(queue);
        let head = self.next_descriptor[queue] % size;
        let mut addresses = Vec::new();
        for (number, part) in (0..).zip(parts) {
            let index = (head + number) % size;
            let (len, flags) = match part {
                Part::Readable(bytes) => (bytes.len() as u32, 0),
                Part::Writable(len) => (*len, 2),
            };
            if self.next_buffer + u64::from(len) > MEMORY as u64 {
                self.next_buffer = BUFFERS;
            }
            let address = self.next_buffer;
            self.next_buffer += u64::from(len).next_multiple_of(16);
            if let Part::Readable(bytes) = part {
                self.memory
                    .write_slice(bytes, GuestAddress(address))
                    .unwrap();
            }
            let last = usize::from(number) + 1 == parts.len();
            let flags: u16 = flags | u16::from(!last);
            self.descriptor(queue, index, address, len, flags, (index + 1) % size);
            addresses.push(address);
        }
        self.next_descriptor[queue] = (head + parts.len() as u16) % size;
        let slot = self.avail(queue) + 4 + u64::from(self.offered[queue] % size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        self.memory
            .write_obj(self.offered[queue], GuestAddress(self.avail(queue) + 2))
            .unwrap();
        addresses
    }

    /// Writes one descriptor as it is.
    pub fn descriptor(
        &self,
        queue: usize,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = self.ring(queue) + u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Tells the device.
    pub fn notify(&mut self, queue: usize) {
        self.transport.write(0x50, &(queue as u32).to_le_bytes());
    }

    /// Puts a request into the ring and tells the device.
    pub fn send(&mut self, queue: usize, parts: &[Part]) -> Vec<u64> {
        let addresses = self.offer(queue, parts);
        self.notify(queue);
        addresses
    }

    /// Requests the device has given back since the last call: head and bytes written.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let base = self.ring(queue) + USED;
        let end: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        let mut found = Vec::new();
        while self.taken[queue] != end {
            let at = base + 4 + u64::from(self.taken[queue] % self.size(queue)) * 8;
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            found.push((head, len));
            self.taken[queue] = self.taken[queue].wrapping_add(1);
        }
        found
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
