//! Only the transport has something to save.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::Rng;
use crate::bus::IrqLine;
use crate::virtio::persist::TransportState;
use crate::virtio::{Error, Transport};

/// A saved source of entropy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {
    transport: TransportState,
}

impl Transport<Rng> {
    /// The state to save.
    pub fn save(&self) -> RngState {
        RngState {
            transport: self.save_transport(),
        }
    }

    /// The device as it was saved.
    pub fn restore(
        state: &RngState,
        memory: Arc<GuestMemoryMmap>,
        irq: Arc<dyn IrqLine>,
    ) -> Result<Self, Error> {
        let mut transport = Transport::new(Rng, memory, irq);
        transport.restore_transport(&state.transport)?;
        Ok(transport)
    }
}
