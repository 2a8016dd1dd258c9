//! The ways a guest ends itself: ACPI sleep and reset registers, and the keyboard controller's
//! reset line for kernels that do not use ACPI.

pub mod device;

pub use device::{Keyboard, Power, PowerEvent, PowerSink};

#[cfg(test)]
mod tests;
