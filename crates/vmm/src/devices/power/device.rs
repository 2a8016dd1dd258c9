//! Registers that report and hold nothing: there is no state to save.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use vm_superio::{I8042Device, Trigger};

use crate::boot::acpi::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::bus::BusDevice;

/// How the guest ended itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// It switched itself off.
    Off,
    /// It asked for a restart. A machine does not start again: the controller decides.
    Reset,
}

/// Who is told. Called on a vCPU thread, which will be stopped soon after.
pub trait PowerSink: Send + Sync + fmt::Debug {
    /// The guest ended itself.
    fn ended(&self, event: PowerEvent);
}

/// ACPI sleep control, sleep status and reset register, one port each.
#[derive(Debug)]
pub struct Power(Arc<dyn PowerSink>);

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
/// Sleep control: go to sleep now, and where the kind of sleep is.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

impl Power {
    /// Reports to `sink`.
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self(sink)
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_OFF => {
                self.0.ended(PowerEvent::Off);
            }
            RESET if value == RESET_VALUE => self.0.ended(PowerEvent::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller, of which only the line to the reset pin exists.
#[derive(Debug)]
pub struct Keyboard(I8042Device<ResetPin>);

#[derive(Debug)]
struct ResetPin(Arc<dyn PowerSink>);

impl Trigger for ResetPin {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.ended(PowerEvent::Reset);
        Ok(())
    }
}

impl Keyboard {
    /// Reports to `sink`.
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self(I8042Device::new(ResetPin(sink)))
    }
}

impl BusDevice for Keyboard {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        data.fill(self.0.read(offset));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[value]) = (u8::try_from(offset), data) {
            let Ok(()) = self.0.write(offset, value);
        }
    }
}
