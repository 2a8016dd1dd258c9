//! A disk: a raw file or block device, read-only or writable.
//!
//! Requests are served where the driver's notification arrives, so none is under way while the
//! machine is paused, and a copy of the machine finds the disk as its memory remembers it. Reads and
//! writes name their offset: copies of a machine share the file without sharing a position.

pub mod device;
pub mod persist;
pub mod request;

pub use device::{Block, Disk};
pub use persist::BlockState;

#[cfg(test)]
mod tests;
