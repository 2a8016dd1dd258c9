//! The serial console: what the guest prints goes to a descriptor, bounded.

pub mod device;
pub mod persist;

pub use device::{Console, OUTPUT_MAX, Sink};
pub use persist::ConsoleState;

#[cfg(test)]
mod tests;
