//! The machine's devices, one directory each with the same file names.
//!
//! ```text
//! device   what it does          request  what a guest may ask of it
//! persist  what is saved of it   tests
//! ```
//!
//! A device is plain saved state plus host resources: the state is carried over to a copy of the
//! machine, the resources are given to the copy anew.

pub mod block;
pub mod generation;
pub mod net;
pub mod power;
pub mod rng;
pub mod serial;
pub mod set;
pub mod vsock;
