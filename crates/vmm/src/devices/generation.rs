//! The generation identifier (VMGENID): 16 bytes that are new in every copy of a machine.
//!
//! A guest that finds them changed knows that its random numbers, identifiers and leases may exist
//! twice. Linux reseeds its generator. The bytes lie in guest memory; the DSDT names the page, and an
//! interrupt to the generic event device announces a change.

pub mod device;
pub mod persist;

pub use device::Generation;
pub use persist::GenerationState;

#[cfg(test)]
mod tests;
