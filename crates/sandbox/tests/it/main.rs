//! The heart over the fake engine: everything real but the machines.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test ends where something unexpected happens, and says when it is skipped"
)]

mod admission;
mod behind;
mod branches;
mod forks;
mod recovery;
mod snapshots;
mod world;
