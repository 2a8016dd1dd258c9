//! Only the documented values end the machine.

use std::sync::{Arc, Mutex};

use super::*;
use crate::bus::{BusDevice as _, lock};

#[derive(Debug, Default)]
struct Heard(Mutex<Vec<PowerEvent>>);

impl PowerSink for Heard {
    fn ended(&self, event: PowerEvent) {
        lock(&self.0).push(event);
    }
}

#[test]
fn acpi_registers_switch_off_and_reset() {
    let heard = Arc::new(Heard::default());
    let mut power = Power::new(heard.clone());
    for value in 0..=255 {
        power.write(0, &[value]);
    }
    // Sleep type 5 with the enable bit, the other bits free.
    assert_eq!(lock(&heard.0).len(), 16);
    assert!(
        lock(&heard.0)
            .drain(..)
            .all(|event| event == PowerEvent::Off)
    );
    power.write(2, &[0]);
    power.write(2, &[1, 0]);
    assert!(lock(&heard.0).is_empty());
    power.write(2, &[1]);
    assert_eq!(*lock(&heard.0), [PowerEvent::Reset]);
}

#[test]
fn keyboard_controller_resets() {
    let heard = Arc::new(Heard::default());
    let mut keyboard = Keyboard::new(heard.clone());
    let mut data = [0xff];
    keyboard.read(4, &mut data);
    assert_eq!(data, [0]);
    keyboard.write(0, &[0xfe]);
    keyboard.write(4, &[0xfd]);
    assert!(lock(&heard.0).is_empty());
    keyboard.write(4, &[0xfe]);
    assert_eq!(*lock(&heard.0), [PowerEvent::Reset]);
}
