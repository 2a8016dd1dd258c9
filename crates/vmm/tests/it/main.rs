//! The monitor on the real /dev/kvm, with the built-in test guest. Each test starts its own processes
//! and directory. Without /dev/kvm the tests say that they were skipped, unless FORKD_TEST_KVM is
//! set: then they fail.

mod support;

mod branch;
mod confine;
mod fork;
mod input;
mod trouble;
