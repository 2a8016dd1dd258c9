//! The transport's part of a saved device.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use super::{Device, Error, Transport};

/// Registers and rings of one virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    pub(super) features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) status: u32,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    pub(super) queues: Vec<RingState>,
}

/// One ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingState {
    max_size: u16,
    size: u16,
    ready: bool,
    event_index: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<&Queue> for RingState {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_index: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl RingState {
    fn restore(self, index: usize, max_size: u16) -> Result<Queue, Error> {
        if self.max_size != max_size {
            let reason = format!("it holds {} entries instead of {max_size}", self.max_size);
            return Err(Error::Queue { index, reason });
        }
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_index,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
        .map_err(|error| Error::Queue {
            index,
            reason: error.to_string(),
        })
    }
}

impl<D: Device> Transport<D> {
    /// The transport's registers and rings. The device's own state is saved beside it.
    pub fn save_transport(&self) -> TransportState {
        TransportState {
            queues: self.queues.rings.iter().map(RingState::from).collect(),
            ..self.registers()
        }
    }

    /// Takes over what [`Transport::save_transport`] returned. An invalid ring in use makes the
    /// device ask for a reset, as it would have done while running.
    pub fn restore_transport(&mut self, state: &TransportState) -> Result<(), Error> {
        let sizes = self.device.queue_sizes();
        if state.queues.len() != sizes.len() {
            let (found, expected) = (state.queues.len(), sizes.len());
            return Err(Error::QueueCount { found, expected });
        }
        let missing = state.driver_features & !self.offered();
        if missing != 0 {
            return Err(Error::Features { missing });
        }
        let mut rings = Vec::with_capacity(sizes.len());
        for (index, (ring, size)) in state.queues.iter().zip(sizes).enumerate() {
            rings.push(ring.restore(index, *size)?);
        }
        self.queues.rings = rings;
        self.set_registers(state);
        Ok(())
    }
}
