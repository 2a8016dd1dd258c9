//! Writes identifiers and announces them.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::boot::layout;
use crate::bus::IrqLine;
use crate::random;

/// Bytes of an identifier.
pub const LEN: usize = 16;

/// The page of the identifier and the line that announces a new one.
#[derive(Debug)]
pub struct Generation {
    memory: Arc<GuestMemoryMmap>,
    irq: Arc<dyn IrqLine>,
    pub(super) current: [u8; LEN],
}

/// A new identifier could not be given to the guest, which must not run then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel gave no random bytes.
    #[error("no random bytes for a new generation identifier")]
    Random(#[source] io::Error),
    /// Guest memory has no page for it.
    #[error("the guest's memory has no page for the generation identifier")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

impl Generation {
    /// Gives a fresh machine its first identifier.
    pub fn new(memory: Arc<GuestMemoryMmap>, irq: Arc<dyn IrqLine>) -> Result<Self, Error> {
        let mut device = Self {
            memory,
            irq,
            current: [0; LEN],
        };
        device.replace()?;
        Ok(device)
    }

    pub(super) fn with(
        memory: Arc<GuestMemoryMmap>,
        irq: Arc<dyn IrqLine>,
        current: [u8; LEN],
    ) -> Self {
        Self {
            memory,
            irq,
            current,
        }
    }

    /// Gives a copy of a machine an identifier of its own and announces it. Called before the copy's
    /// first instruction, after its interrupt controllers were restored.
    pub fn renew(&mut self) -> Result<(), Error> {
        self.replace()?;
        self.irq.raise();
        Ok(())
    }

    /// The identifier the guest sees.
    pub fn current(&self) -> [u8; LEN] {
        self.current
    }

    fn replace(&mut self) -> Result<(), Error> {
        let mut fresh = [0; LEN];
        random::fill(&mut fresh).map_err(Error::Random)?;
        self.memory
            .write_slice(&fresh, GuestAddress(layout::GENERATION.base))
            .map_err(Error::Memory)?;
        self.current = fresh;
        Ok(())
    }
}
