//! The engine with stock Linux guests, where the CPU can run them: natively on a machine with vmx or svm, else in the
//! lab.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::contract::{World, check};
use crate::{Exit, Lifetime, test_image};

/// In the lab every guest is emulated twice over.
const PATIENCE: Duration = Duration::from_secs(180);

/// The machine of the test image; `None`, and why on the output, where it cannot be run.
fn machine() -> Option<MachineSpec> {
    if !startable() {
        return None;
    }
    if Facts::collect().cpu.virtualization.is_none() {
        eprintln!("skipped: no /dev/kvm with vmx or svm behind it; `make lab` runs this");
        return None;
    }
    test_image::machine(256, true)
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract() {
    let Some(machine) = machine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Firecracker::new(PROGRAM));
    check(&World::new(engine, machine, dir.path(), PATIENCE)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_guest_is_told_from_a_polite_one() {
    let Some(mut machine) = machine() else { return };
    machine.cmdline = "rdinit=/no/such/program".to_owned();
    let dir = tempfile::tempdir().unwrap();
    let spec = BootSpec {
        id: "trouble".to_owned(),
        run_dir: dir.path().to_owned(),
        machine,
        memory_file: dir.path().join("ram"),
        lifetime: Lifetime::DieWithParent,
        slot: None,
    };
    let vm = Firecracker::new(PROGRAM).boot(spec).await.unwrap();
    let exit = tokio::time::timeout(PATIENCE, vm.exited()).await.unwrap();
    assert_eq!(exit, Exit::Reset);
    let console = std::fs::read_to_string(vm.console()).unwrap();
    assert!(console.contains("Kernel panic"), "{console}");
}
