//! Moves frames between the guest's queues and the tap.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};

use super::sys;
use crate::virtio::poll::Poller;
use crate::virtio::{Chain, Device, Queues, kind};

const QUEUE_SIZES: &[u16] = &[256, 256];
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
/// Length of the header in front of every frame, on both sides.
pub(super) const HEADER_LEN: usize = 12;
/// Where the header says how many buffers a frame is spread over.
const BUFFERS_OFFSET: usize = 10;
/// Largest frame: an unsegmented packet, its Ethernet header with a tag, and ours.
pub(super) const FRAME_MAX: usize = HEADER_LEN + 18 + 65535;
/// Smallest frame worth sending: both headers.
const FRAME_MIN: usize = HEADER_LEN + 14;

const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;

/// A tap device, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
#[derive(Debug)]
pub struct Tap {
    file: File,
    poller: Poller,
}

/// A descriptor that cannot serve as a tap.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused the header length.
    #[error("not a tap device with IFF_VNET_HDR")]
    NotTap(#[source] io::Error),
    /// It could not be watched.
    #[error("could not watch the tap device")]
    Watch(#[source] io::Error),
}

impl Tap {
    /// Takes over a tap.
    pub fn new(fd: OwnedFd) -> Result<Self, Error> {
        sys::set_header_len(&fd, HEADER_LEN as i32).map_err(Error::NotTap)?;
        Self::watched(fd)
    }

    /// Takes over anything that keeps frames apart, for tests and fuzzing: a datagram socket.
    pub fn datagrams(fd: OwnedFd) -> Result<Self, Error> {
        Self::watched(fd)
    }

    fn watched(fd: OwnedFd) -> Result<Self, Error> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| Error::Watch(error.into()))?;
        let poller = Poller::new().map_err(Error::Watch)?;
        poller.watch(&fd, 0).map_err(Error::Watch)?;
        Ok(Self {
            file: File::from(fd),
            poller,
        })
    }
}

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: Option<Tap>,
    pub(super) mac: [u8; 6],
    merge: bool,
    /// A frame read from the tap for which the guest had no room.
    frame: Vec<u8>,
}

impl Net {
    /// A card with address `mac`. Without a tap the cable is out: what is sent is dropped.
    pub fn new(tap: Option<Tap>, mac: [u8; 6]) -> Self {
        Self {
            tap,
            mac,
            merge: false,
            frame: Vec::new(),
        }
    }

    /// Reads frames until the tap is empty or the guest has no room.
    fn receive(&mut self, queues: &mut Queues) {
        loop {
            if self.frame.is_empty() && !self.read_frame() {
                return;
            }
            if !self.deliver(queues) {
                return;
            }
            self.frame.clear();
        }
    }

    fn read_frame(&mut self) -> bool {
        let Some(tap) = &mut self.tap else {
            return false;
        };
        self.frame.resize(FRAME_MAX, 0);
        let len = loop {
            match tap.file.read(&mut self.frame) {
                // A header alone is no frame.
                Ok(len) if len < FRAME_MIN && len > 0 => {}
                Ok(len) => break len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Empty, or the interface is gone: the cable is out.
                Err(_) => break 0,
            }
        };
        self.frame.truncate(len);
        len > 0
    }

    /// Gives `self.frame` to the guest. False when it must wait for buffers.
    fn deliver(&mut self, queues: &mut Queues) -> bool {
        let most = if self.merge { QUEUE_SIZES[RX] } else { 1 };
        let mut parts: Vec<(u16, u32)> = Vec::new();
        let mut buffers = Vec::new();
        let mut room = 0;
        while room < self.frame.len() && buffers.len() < usize::from(most) {
            let Some(chain) = queues.next(RX) else {
                for _ in &buffers {
                    queues.undo_pop(RX);
                }
                return false;
            };
            room += writable_len(&chain);
            buffers.push(chain);
        }
        // The guest gave too little where it may not give more: the frame is lost, as on a wire.
        let fits = room >= self.frame.len();
        let mut rest = std::mem::take(&mut self.frame);
        let count = u16::try_from(buffers.len()).unwrap_or(1);
        rest[BUFFERS_OFFSET..HEADER_LEN].copy_from_slice(&count.to_le_bytes());
        let mut at = 0;
        for chain in buffers {
            let head = chain.head_index();
            let written = if fits {
                fill(chain, queues, &rest[at..])
            } else {
                0
            };
            at += written;
            parts.push((head, written as u32));
        }
        for (head, written) in parts {
            queues.push(RX, head, written);
        }
        rest.clear();
        self.frame = rest;
        true
    }

    fn transmit(&mut self, queues: &mut Queues) {
        let mut frame = vec![0; FRAME_MAX];
        while let Some(chain) = queues.next(TX) {
            let head = chain.head_index();
            if let (Some(len), Some(tap)) = (gather(chain, queues, &mut frame), &mut self.tap) {
                // A full or missing interface loses frames, as a wire does. A frame is one write
                // and never continued.
                let _sent = tap.file.write(&frame[..len]).unwrap_or(0);
            }
            queues.push(TX, head, 0);
        }
    }
}

/// Bytes the guest offers in one buffer.
fn writable_len(chain: &Chain) -> usize {
    chain
        .clone()
        .writable()
        .map(|part| part.len() as usize)
        .sum()
}

/// Writes the start of `bytes` into a buffer and returns how much went in.
fn fill(chain: Chain, queues: &Queues, bytes: &[u8]) -> usize {
    let Ok(mut buffer) = chain.writer(queues.memory().as_ref()) else {
        return 0;
    };
    let len = buffer.available_bytes().min(bytes.len());
    match buffer.write_all(&bytes[..len]) {
        Ok(()) => len,
        Err(_) => 0,
    }
}

/// Collects a frame to send. None for what is no frame.
fn gather(chain: Chain, queues: &Queues, frame: &mut [u8]) -> Option<usize> {
    let mut buffers = chain.reader(queues.memory().as_ref()).ok()?;
    let len = buffers.available_bytes();
    if !(FRAME_MIN..=frame.len()).contains(&len) {
        return None;
    }
    buffers.read_exact(&mut frame[..len]).ok()?;
    Some(len)
}

impl Device for Net {
    fn kind(&self) -> u32 {
        kind::NET
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .iter()
        .fold(0, |bits, bit| bits | (1 << bit))
    }

    fn activate(&mut self, features: u64) {
        let has = |bit: u32| features & (1 << bit) != 0;
        self.merge = has(VIRTIO_NET_F_MRG_RXBUF);
        let mut offload = 0;
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            offload |= TUN_F_CSUM;
            if has(VIRTIO_NET_F_GUEST_TSO4) {
                offload |= TUN_F_TSO4;
            }
            if has(VIRTIO_NET_F_GUEST_TSO6) {
                offload |= TUN_F_TSO6;
            }
        }
        if let Some(tap) = &self.tap {
            // Refused only by what is no tap, and that segments nothing.
            sys::set_offload(tap.file.as_fd(), offload).ok();
        }
    }

    fn reset(&mut self) {
        self.merge = false;
        self.frame.clear();
    }

    fn config(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn process(&mut self, queue: usize, queues: &mut Queues) {
        match queue {
            RX => self.receive(queues),
            _ => self.transmit(queues),
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.tap.as_ref().map(|tap| tap.poller.as_fd())
    }

    fn ready(&mut self, queues: &mut Queues) {
        if let Some(tap) = &self.tap {
            tap.poller.take();
        }
        self.receive(queues);
    }
}
