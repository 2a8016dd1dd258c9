//! What a saved disk must be given again: a file of the same size and kind.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::request::ID_LEN;
use super::{Block, Disk};
use crate::bus::IrqLine;
use crate::virtio::persist::TransportState;
use crate::virtio::{self, Transport};

/// A saved disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    transport: TransportState,
    bytes: u64,
    read_only: bool,
    id: String,
}

/// A saved disk does not go with what was given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest believes in another size.
    #[error(
        "the disk has {found} bytes, but {expected} when the machine was saved; give the same disk"
    )]
    Size {
        /// Bytes of the file.
        found: u64,
        /// Bytes the guest believes in.
        expected: u64,
    },
    /// The guest was told otherwise.
    #[error("the disk was {} when the machine was saved", if *.0 { "read-only" } else { "writable" })]
    Mode(bool),
    /// The transport's part.
    #[error("the disk's queue")]
    Transport(#[from] virtio::Error),
}

impl BlockState {
    /// Whether the disk was read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }
}

impl Transport<Block> {
    /// The state to save.
    pub fn save(&self) -> BlockState {
        let device = self.device();
        let end = device
            .id
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(ID_LEN);
        BlockState {
            transport: self.save_transport(),
            bytes: device.disk().bytes(),
            read_only: device.disk().is_read_only(),
            id: String::from_utf8_lossy(&device.id[..end]).into_owned(),
        }
    }

    /// The device as it was saved, over `disk`.
    pub fn restore(
        state: &BlockState,
        disk: Disk,
        memory: Arc<GuestMemoryMmap>,
        irq: Arc<dyn IrqLine>,
    ) -> Result<Self, Error> {
        if disk.bytes() != state.bytes {
            return Err(Error::Size {
                found: disk.bytes(),
                expected: state.bytes,
            });
        }
        if disk.is_read_only() != state.read_only {
            return Err(Error::Mode(state.read_only));
        }
        let mut transport = Transport::new(Block::new(disk, &state.id), memory, irq);
        transport.restore_transport(&state.transport)?;
        Ok(transport)
    }
}
