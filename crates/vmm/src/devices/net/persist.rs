//! A saved card keeps its address; the tap is given anew. A frame that waited for the guest is lost.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::{Net, Tap};
use crate::bus::IrqLine;
use crate::virtio::persist::TransportState;
use crate::virtio::{Error, Transport};

/// A saved network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    transport: TransportState,
    mac: [u8; 6],
}

impl Transport<Net> {
    /// The state to save.
    pub fn save(&self) -> NetState {
        NetState {
            transport: self.save_transport(),
            mac: self.device().mac,
        }
    }

    /// The device as it was saved, on another tap.
    pub fn restore(
        state: &NetState,
        tap: Option<Tap>,
        memory: Arc<GuestMemoryMmap>,
        irq: Arc<dyn IrqLine>,
    ) -> Result<Self, Error> {
        let mut transport = Transport::new(Net::new(tap, state.mac), memory, irq);
        transport.restore_transport(&state.transport)?;
        Ok(transport)
    }
}
