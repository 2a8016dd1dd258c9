//! The machine with real Linux guests. Runs inside the lab (`cargo xtask lab`), where /dev/kvm is
//! true; elsewhere every test says that it was skipped.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "helpers of tests are tests; what they print is kept with the run"
)]

mod boot;
mod copy;
mod devices;
mod guest;
mod node;
mod process;
mod tap;
