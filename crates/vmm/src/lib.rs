//! The built-in machine monitor: one VM is one process, and forking the process forks the VM.
//!
//! The library exists so that tests, the benchmark and the fuzz targets can link the parts; the
//! program `forkd-vmm` is the only user otherwise. Nothing here links an async runtime.
//!
//! `unsafe` appears in `sys.rs`, `memory.rs`, `kvm.rs` and `vcpu.rs`, and nowhere else.

pub mod boot;
pub mod bus;
pub mod control;
pub mod devices;
pub mod exit;
pub mod guest;
pub mod host;
pub mod kvm;
pub mod layers;
pub mod machine;
pub mod memory;
pub mod state;
pub mod sys;
pub mod vcpu;
pub mod virtio;
