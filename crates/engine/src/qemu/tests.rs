//! The qemu engine: pure parts always, the contract with real guests where an image is at hand.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::MachineSpec;
use crate::contract::{World, check};

/// A directory that holds `kernel`, `initramfs` and `rootfs`.
const IMAGE: &str = "FORKD_TEST_IMAGE_DIR";
/// Guests in software emulation, with other tests beside them.
const PATIENCE: Duration = Duration::from_secs(60);

/// The machine of the test image; `None` where there is none.
fn machine() -> Option<MachineSpec> {
    let dir = PathBuf::from(std::env::var_os(IMAGE)?);
    Some(MachineSpec {
        vcpus: 1,
        memory_mib: 512,
        kernel: dir.join("kernel"),
        initramfs: dir.join("initramfs"),
        rootfs: dir.join("rootfs"),
        cmdline: String::new(),
        network: false,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract() {
    let Some(machine) = machine() else {
        eprintln!("skipped: {IMAGE} names no directory with kernel, initramfs and rootfs");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Qemu::new(PROGRAM, Accel::Tcg));
    check(&World::new(engine, machine, dir.path(), PATIENCE)).await;
}
