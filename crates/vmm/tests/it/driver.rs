//! A driver of the test guest's devices: every access is a command to the guest, which makes it for us.

use forkd_vmm::client::Process;
use forkd_vmm::guest::{READ, WRITE};

/// Where the rings of all devices lie; far above the program.
const RINGS: u32 = 0x20_0000;
const RING: u32 = 0x3000;
const AVAIL: u32 = 0x1000;
const USED: u32 = 0x2000;
const SIZE: u32 = 8;

/// The device writes this buffer.
pub(crate) const WRITABLE: u32 = 2;

pub(crate) fn read(guest: &mut Process, address: u32) -> u32 {
    guest.run(READ, [address, 0, 0]).unwrap() as u32
}

pub(crate) fn write(guest: &mut Process, address: u32, value: u32) {
    assert_eq!(guest.run(WRITE, [address, value, 0]).unwrap(), 0);
}

pub(crate) fn read_bytes(guest: &mut Process, address: u32, len: u32) -> Vec<u8> {
    (0..len.div_ceil(4))
        .flat_map(|word| read(guest, address + 4 * word).to_le_bytes())
        .take(len as usize)
        .collect()
}

pub(crate) fn write_bytes(guest: &mut Process, address: u32, bytes: &[u8]) {
    for (word, at) in bytes.chunks(4).zip((address..).step_by(4)) {
        let mut whole = [0; 4];
        whole[..word.len()].copy_from_slice(word);
        write(guest, at, u32::from_le_bytes(whole));
    }
}

/// One virtio device, as its driver sees it. What the guest's memory holds is branched with it; this
/// side can be copied with it.
#[derive(Debug, Clone)]
pub(crate) struct Driver {
    slot: u32,
    descriptors: Vec<u32>,
    offered: Vec<u32>,
}

impl Driver {
    /// Starts the device in `slot` with `queues` queues and no feature but the version.
    pub(crate) fn start(guest: &mut Process, slot: u32, queues: u32) -> Driver {
        let driver = Driver {
            slot,
            descriptors: vec![0; queues as usize],
            offered: vec![0; queues as usize],
        };
        let mut set = |offset, value| write(guest, driver.register(offset), value);
        for status in [0, 1, 3] {
            set(0x70, status);
        }
        set(0x24, 0);
        set(0x20, 0);
        set(0x24, 1);
        set(0x20, 1);
        set(0x70, 0xb);
        for queue in 0..queues {
            let ring = driver.ring(queue);
            set(0x30, queue);
            set(0x38, SIZE);
            for (offset, address) in [(0x80, ring), (0x90, ring + AVAIL), (0xa0, ring + USED)] {
                set(offset, address);
                set(offset + 4, 0);
            }
            set(0x44, 1);
        }
        set(0x70, 0xf);
        assert_eq!(read(guest, driver.register(0x70)), 0xf, "the device is on");
        driver
    }

    fn register(&self, offset: u32) -> u32 {
        0xd000_0000 + 0x1000 * self.slot + offset
    }

    fn ring(&self, queue: u32) -> u32 {
        RINGS + (4 * self.slot + queue) * RING
    }

    /// Offers a chain of buffers: address, length, flags. Does not tell the device.
    pub(crate) fn offer(&mut self, guest: &mut Process, queue: u32, parts: &[(u32, u32, u32)]) {
        let (ring, of) = (self.ring(queue), queue as usize);
        let head = self.descriptors[of];
        assert!(head + parts.len() as u32 <= SIZE, "the tests never wrap");
        for (number, (address, len, flags)) in (0u32..).zip(parts) {
            let at = ring + 16 * (head + number);
            let more = u32::from(number + 1 < parts.len() as u32);
            let next = (head + number + 1) * more;
            write(guest, at, *address);
            write(guest, at + 4, 0);
            write(guest, at + 8, *len);
            write(guest, at + 12, flags | more | next << 16);
        }
        self.descriptors[of] += parts.len() as u32;
        let index = self.offered[of];
        // Entries have 16 bits and the guest writes 32: every second one goes beside the one before.
        let slot = ring + AVAIL + 4 + 2 * (index & !1);
        if index.is_multiple_of(2) {
            write(guest, slot, head);
        } else {
            let before = read(guest, slot) & 0xffff;
            write(guest, slot, before | head << 16);
        }
        self.offered[of] += 1;
        write(guest, ring + AVAIL, self.offered[of] << 16);
    }

    /// Tells the device to look.
    pub(crate) fn notify(&self, guest: &mut Process, queue: u32) {
        write(guest, self.register(0x50), queue);
    }

    /// How many chains the device has given back.
    pub(crate) fn used(&self, guest: &mut Process, queue: u32) -> u32 {
        read(guest, self.ring(queue) + USED) >> 16
    }

    /// Waits until the device has given back `count` chains.
    pub(crate) fn wait(&self, guest: &mut Process, queue: u32, count: u32) {
        let deadline = std::time::Instant::now() + forkd_vmm::client::PATIENCE;
        while self.used(guest, queue) < count {
            assert!(std::time::Instant::now() < deadline, "never given back");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}
