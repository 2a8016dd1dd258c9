//! Serves requests from a file.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_queue::{Reader, Writer};

use super::request::{ID_LEN, Limits, Refused, Request, SECTOR};
use crate::virtio::{Chain, Device, Queues, kind};

const QUEUE_SIZES: &[u16] = &[256];
/// Buffers of one request besides header and status.
const SEGMENTS_MAX: u32 = 254;
/// Bytes moved between file and guest at a time.
const CHUNK: usize = 128 << 10;

/// What is behind a disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    bytes: u64,
    read_only: bool,
}

/// A file that cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its size could not be had.
    #[error("could not find the size of the disk")]
    Size(#[source] io::Error),
    /// It has no whole sector.
    #[error("a disk of {0} bytes is smaller than one sector of 512")]
    Small(u64),
}

impl Disk {
    /// Takes a raw image or a block device. Bytes after the last whole sector are not used.
    pub fn new(mut file: File, read_only: bool) -> Result<Self, Error> {
        // A block device has no length of its own.
        let found = file.seek(SeekFrom::End(0)).map_err(Error::Size)?;
        let bytes = found - found % SECTOR;
        if bytes == 0 {
            return Err(Error::Small(found));
        }
        Ok(Self {
            file,
            bytes,
            read_only,
        })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, mut offset: u64, mut left: u64, to: &mut Writer<'_>) -> io::Result<u32> {
        let mut chunk = vec![0; chunk_len(left)];
        let mut written = 0;
        while left > 0 {
            let len = chunk_len(left);
            let part = &mut chunk[..len];
            self.file.read_exact_at(part, offset)?;
            to.write_all(part)?;
            offset += len as u64;
            left -= len as u64;
            written += len as u32;
        }
        Ok(written)
    }

    fn write(&self, mut offset: u64, mut left: u64, from: &mut Reader<'_>) -> io::Result<()> {
        let mut chunk = vec![0; chunk_len(left)];
        while left > 0 {
            let len = chunk_len(left);
            let part = &mut chunk[..len];
            from.read_exact(part)?;
            self.file.write_all_at(part, offset)?;
            offset += len as u64;
            left -= len as u64;
        }
        Ok(())
    }
}

fn chunk_len(left: u64) -> usize {
    usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    pub(super) id: [u8; ID_LEN],
}

impl Block {
    /// Serves `disk`; `id` is the serial number the guest sees, cut to 20 bytes.
    pub fn new(disk: Disk, id: &str) -> Self {
        let mut bytes = [0; ID_LEN];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self { disk, id: bytes }
    }

    /// What is behind the disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Serves one request and returns the bytes written to the guest.
    fn serve(&self, chain: Chain, queues: &Queues) -> u32 {
        let memory = queues.memory().as_ref();
        let Ok(mut readable) = chain.clone().reader(memory) else {
            return 0;
        };
        let Ok(mut writable) = chain.writer(memory) else {
            return 0;
        };
        // Without a byte for the status there is no way to answer.
        let Some(room) = writable.available_bytes().checked_sub(1) else {
            return 0;
        };
        let Ok(mut status) = writable.split_at(room) else {
            return 0;
        };
        let limits = Limits {
            bytes: self.disk.bytes,
            read_only: self.disk.read_only,
        };
        let done = match Request::parse(&mut readable, room, limits) {
            Ok(request) => self.perform(request, &mut readable, &mut writable),
            Err(Refused::Unsupported) => Err(VIRTIO_BLK_S_UNSUPP),
            Err(Refused::Invalid) => Err(VIRTIO_BLK_S_IOERR),
        };
        let (written, code) = match done {
            Ok(written) => (written, VIRTIO_BLK_S_OK),
            Err(code) => (0, code),
        };
        match status.write_all(&[code as u8]) {
            Ok(()) => written + 1,
            Err(_) => 0,
        }
    }

    fn perform(
        &self,
        request: Request,
        readable: &mut Reader<'_>,
        writable: &mut Writer<'_>,
    ) -> Result<u32, u32> {
        let done = match request {
            Request::Read { offset, bytes } => self.disk.read(offset, bytes, writable),
            Request::Write { offset, bytes } => {
                self.disk.write(offset, bytes, readable).map(|()| 0)
            }
            Request::Flush if self.disk.read_only => Ok(0),
            Request::Flush => self.disk.file.sync_data().map(|()| 0),
            Request::Id => writable.write_all(&self.id).map(|()| ID_LEN as u32),
        };
        // The guest's file system hears of the failure; the machine goes on.
        done.map_err(|_| VIRTIO_BLK_S_IOERR)
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        kind::BLOCK
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let writes = if self.disk.read_only {
            VIRTIO_BLK_F_RO
        } else {
            VIRTIO_BLK_F_FLUSH
        };
        (1 << writes) | (1 << VIRTIO_BLK_F_SEG_MAX)
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    /// Capacity in sectors, largest segment (unused), number of segments.
    fn config(&self) -> Vec<u8> {
        let mut config = (self.disk.bytes / SECTOR).to_le_bytes().to_vec();
        config.extend(0u32.to_le_bytes());
        config.extend(SEGMENTS_MAX.to_le_bytes());
        config
    }

    fn process(&mut self, queue: usize, queues: &mut Queues) {
        while let Some(chain) = queues.next(queue) {
            let head = chain.head_index();
            let written = self.serve(chain, queues);
            queues.push(queue, head, written);
        }
    }
}
