//! The heart over the fake engine: everything real but the machines.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

mod admission;
mod behind;
mod branches;
mod forks;
mod recovery;
mod snapshots;
mod world;
