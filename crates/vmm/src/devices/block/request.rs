//! What a driver may ask of a disk: parsed and checked, nothing done yet.

use std::io::Read as _;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::Reader;

/// Bytes in a sector, the unit of the interface whatever the disk's own is.
pub const SECTOR: u64 = 512;
/// Bytes of a serial number.
pub const ID_LEN: usize = 20;
/// Bytes of a request's header.
const HEADER_LEN: usize = 16;

/// A valid request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Read `bytes` from `offset` into the driver's buffers.
    Read {
        /// Byte offset on the disk.
        offset: u64,
        /// A multiple of the sector size that the disk holds.
        bytes: u64,
    },
    /// Write `bytes` of the driver's buffers to `offset`.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// A multiple of the sector size that the disk holds.
        bytes: u64,
    },
    /// Make what was written durable.
    Flush,
    /// Tell the serial number.
    Id,
}

/// What is wrong with a request; becomes its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The disk does not do this.
    Unsupported,
    /// It is malformed, or beyond the end of the disk, or a write to a read-only disk.
    Invalid,
}

/// The disk as far as requests are judged by it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size in bytes, a multiple of the sector size.
    pub bytes: u64,
    /// No writes.
    pub read_only: bool,
}

impl Request {
    /// Parses the header at the start of `readable` and judges the request. `writable` is the room for
    /// data in the driver's buffers, without the byte for the status.
    pub fn parse(
        readable: &mut Reader<'_>,
        writable: usize,
        limits: Limits,
    ) -> Result<Self, Refused> {
        let mut header = [0; HEADER_LEN];
        readable
            .read_exact(&mut header)
            .map_err(|_| Refused::Invalid)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let offset = u64::from_le_bytes(sector)
            .checked_mul(SECTOR)
            .ok_or(Refused::Invalid)?;
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => {
                let bytes = limits.extent(offset, writable)?;
                Ok(Self::Read { offset, bytes })
            }
            VIRTIO_BLK_T_OUT if limits.read_only => Err(Refused::Invalid),
            VIRTIO_BLK_T_OUT => {
                let bytes = limits.extent(offset, readable.available_bytes())?;
                Ok(Self::Write { offset, bytes })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID if writable >= ID_LEN => Ok(Self::Id),
            VIRTIO_BLK_T_GET_ID => Err(Refused::Invalid),
            _ => Err(Refused::Unsupported),
        }
    }
}

impl Limits {
    /// The length of a transfer at `offset`, if the disk holds it.
    fn extent(self, offset: u64, bytes: usize) -> Result<u64, Refused> {
        let bytes = bytes as u64;
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes && bytes.is_multiple_of(SECTOR) => Ok(bytes),
            _ => Err(Refused::Invalid),
        }
    }
}
