//! The built-in machine monitor: one VM is one process, and forking the process forks the VM.
//!
//! The library exists so that tests, the benchmark and the fuzz targets can link the parts; the
//! program `forkd-vmm` is the only user otherwise. Nothing here links an async runtime.
//!
//! `unsafe` appears in `sys.rs`, `memory.rs`, `kvm.rs` and `vcpu.rs`, and nowhere else.

pub mod bench;
pub mod boot;
mod branch;
pub mod bus;
pub mod client;
pub mod control;
pub mod controller;
pub mod devices;
pub mod exit;
#[cfg(any(test, feature = "fuzz"))]
pub mod fixture;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod guest;
pub mod host;
pub mod jail;
pub mod kvm;
pub mod layers;
pub mod machine;
pub mod memory;
pub mod random;
pub mod role;
pub mod sandbox;
pub mod seccomp;
pub mod start;
pub mod state;
pub mod sys;
pub mod template;
pub mod vcpu;
pub mod virtio;
pub mod warm;
pub mod writer;
