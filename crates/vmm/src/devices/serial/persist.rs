//! The port's registers.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

use super::{Console, Sink};
use crate::bus::IrqLine;

/// The saved registers. Output not yet passed on belongs to the machine that printed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// More input is saved than the port holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the saved console holds {0} bytes of input, more than the port has")]
pub struct Error(usize);

impl Console {
    /// The state to save.
    pub fn save(&self) -> ConsoleState {
        let state = self.0.state();
        ConsoleState {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// The port with the saved registers and another sink.
    pub fn restore(state: &ConsoleState, sink: Sink, irq: Arc<dyn IrqLine>) -> Result<Self, Error> {
        let saved = SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        Console::from_state(&saved, sink, irq).map_err(|_| Error(state.in_buffer.len()))
    }
}
