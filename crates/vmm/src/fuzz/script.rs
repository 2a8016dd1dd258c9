//! Bytes as a script: each step a byte that says what to do and the bytes it needs.

use vm_memory::{Bytes as _, GuestAddress};

use crate::bus::BusDevice as _;
use crate::fixture::{Driver, MEMORY, Part};
use crate::virtio::{Device, Transport};

/// Most steps of one script; more would only be slow.
const STEPS_MAX: usize = 512;

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | (u16::from(self.u8()) << 8)
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | (u32::from(self.u16()) << 16)
    }

    /// An address: mostly in memory, sometimes at its end or far outside.
    fn address(&mut self) -> u64 {
        let low = u64::from(self.u32());
        match low % 8 {
            0 => u64::MAX - (low >> 20),
            1 => MEMORY as u64 - (low >> 24),
            _ => low % MEMORY as u64,
        }
    }

    /// A length: mostly small, sometimes enormous.
    fn len(&mut self) -> u32 {
        match self.u8() {
            255 => u32::MAX,
            254 => 0x8000_0000,
            253 => 70_000,
            other => u32::from(other) * 16,
        }
    }
}

/// Lets the script drive `transport`. `host` gets bytes whenever the script lets the host act.
pub(super) fn run<D: Device>(transport: Transport<D>, data: &[u8], host: &mut dyn FnMut(&[u8])) {
    let mut bytes = Bytes(data);
    let features = u64::from(bytes.u32()) & transport.device().features();
    let queues = transport.device().queue_sizes().len();
    let mut driver = Driver::start(transport, features | (u64::from(bytes.u8() & 1) << 29));
    for _ in 0..STEPS_MAX {
        if bytes.0.is_empty() {
            return;
        }
        let what = bytes.u8();
        let queue = usize::from(bytes.u8()) % queues;
        step(&mut driver, what, queue, &mut bytes, host);
    }
}

fn step<D: Device>(
    driver: &mut Driver<D>,
    what: u8,
    queue: usize,
    bytes: &mut Bytes<'_>,
    host: &mut dyn FnMut(&[u8]),
) {
    match what % 10 {
        // Requests that look like requests.
        0..=2 => {
            let mut parts = Vec::new();
            for _ in 0..=bytes.u8() % 5 {
                parts.push(match bytes.u8() {
                    len if len % 2 == 0 => Part::Readable(bytes.take(usize::from(len)).to_vec()),
                    len => Part::Writable(u32::from(len) * 8),
                });
            }
            driver.send(queue, &parts);
        }
        3 => {
            let (index, address, len) = (bytes.u16() % 256, bytes.address(), bytes.len());
            let (flags, next) = (bytes.u16() % 8, bytes.u16());
            driver.descriptor(queue, index, address, len, flags, next);
        }
        4 => {
            let at = driver.avail(queue) + 2 * u64::from(bytes.u8());
            driver.memory.write_obj(bytes.u16(), GuestAddress(at)).ok();
        }
        5 => driver.notify(queue),
        6 => {
            let offset = u64::from(bytes.u8()) * 4;
            let value = bytes.u32();
            driver.transport.write(offset, &value.to_le_bytes());
        }
        7 => {
            let mut data = [0; 8];
            let width = 1 << (bytes.u8() % 4);
            driver
                .transport
                .read(u64::from(bytes.u16()), &mut data[..width]);
        }
        8 => {
            let len = usize::from(bytes.u8());
            host(bytes.take(len));
            driver.transport.host_ready();
        }
        _ => {
            let saved = driver.transport.save_transport();
            driver.transport.restore_transport(&saved).ok();
            driver.transport.resume();
        }
    }
    driver.used(queue);
}
