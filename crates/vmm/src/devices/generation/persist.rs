//! The saved identifier: what the copies must differ from.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::Generation;
use super::device::LEN;
use crate::bus::IrqLine;

/// The identifier at the time of saving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationState {
    current: [u8; LEN],
}

impl Generation {
    /// The state to save.
    pub fn save(&self) -> GenerationState {
        GenerationState {
            current: self.current,
        }
    }

    /// The device with the saved identifier; [`Generation::renew`] follows in a copy.
    pub fn restore(
        state: &GenerationState,
        memory: Arc<GuestMemoryMmap>,
        irq: Arc<dyn IrqLine>,
    ) -> Self {
        Self::with(memory, irq, state.current)
    }
}
