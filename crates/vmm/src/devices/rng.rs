//! A source of entropy for the guest: the host kernel's random numbers.

pub mod device;
pub mod persist;

pub use device::Rng;
pub use persist::RngState;

#[cfg(test)]
mod tests;
