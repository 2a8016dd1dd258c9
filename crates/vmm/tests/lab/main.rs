//! The machine with real Linux guests. Runs inside the lab (`cargo xtask lab`), where /dev/kvm is
//! true; elsewhere every test says that it was skipped.

mod boot;
mod copy;
mod devices;
mod guest;
mod node;
mod tap;
