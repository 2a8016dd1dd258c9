//! A network card on a tap device whose descriptor it is given.
//!
//! Frames to the guest may be larger than one of its buffers (checksum and segmentation are left to
//! whoever finally sends them), so a frame is spread over as many as it needs; when there are not
//! enough, it waits and nothing more is read from the tap.

pub mod device;
pub mod persist;
mod sys;

pub use device::{Net, Tap};
pub use persist::NetState;

#[cfg(test)]
mod tests;
