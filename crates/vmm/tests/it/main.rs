//! The monitor on the real /dev/kvm, with the built-in test guest. Each test starts its own processes
//! and directory. Without /dev/kvm the tests say that they were skipped, unless FORKD_TEST_KVM is
//! set: then they fail.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test ends where something unexpected happens, and says when it is skipped"
)]

mod support;
mod sys;

mod attack;
mod branch;
mod confine;
mod cpus;
mod devices;
mod driver;
mod fork;
mod input;
mod trouble;
