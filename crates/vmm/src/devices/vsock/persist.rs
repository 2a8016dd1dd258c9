//! A saved socket device has no connections: a copy cannot share the original's streams.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::Vsock;
use super::device::{FIRST_PORT, Listener, Reset};
use crate::bus::IrqLine;
use crate::virtio::persist::TransportState;
use crate::virtio::{Error, Transport};

/// A saved socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    transport: TransportState,
    cid: u64,
    /// Ports go on from here, so that none is used again while the guest still remembers it.
    next_port: u32,
}

impl Transport<Vsock> {
    /// The state to save.
    pub fn save(&self) -> VsockState {
        VsockState {
            transport: self.save_transport(),
            cid: self.device().cid,
            next_port: self.device().next_port,
        }
    }

    /// The device of a copy, listening elsewhere. Its guest is told that its connections are gone as
    /// soon as the machine runs ([`Transport::resume`]), and programs are served once it has heard.
    pub fn restore(
        state: &VsockState,
        listener: Option<Listener>,
        memory: Arc<GuestMemoryMmap>,
        irq: Arc<dyn IrqLine>,
    ) -> Result<Self, Error> {
        let mut device = Vsock::new(state.cid, listener);
        device.next_port = state.next_port.max(FIRST_PORT);
        device.reset = Reset::Due;
        let mut transport = Transport::new(device, memory, irq);
        transport.restore_transport(&state.transport)?;
        if !transport.is_active() {
            // A guest that has not started the device has no connections to lose.
            transport.device_mut().reset = Reset::Done;
        }
        Ok(transport)
    }
}
