//! The engine with stock Linux guests, where the CPU can run them: natively on a machine with vmx or svm,
//! else in the lab.

use std::sync::Arc;
use std::time::Duration;

use forkd_host::facts::Facts;
use forkd_host::orphans;

use crate::contract::{World, check};
use crate::kvm::{Kvm, program};
use crate::{
    BootSpec, Engine, Error, Exit, ForkSpec, Lifetime, MachineSpec, SaveMemory, SaveSpec,
    SnapshotFiles, TemplateSpec, Vm, test_image,
};

/// In the lab every guest is emulated twice over.
const PATIENCE: Duration = Duration::from_secs(120);

/// The machine of the test image; `None`, and why on the output, where it cannot be run.
fn machine() -> Option<MachineSpec> {
    let facts = Facts::collect();
    if facts.cpu.virtualization.is_none() {
        eprintln!("skipped: no /dev/kvm with vmx or svm behind it; `make lab` runs this");
        return None;
    }
    startable()
}

/// As [`machine`], for one that need not get far.
fn startable() -> Option<MachineSpec> {
    let kvm = Facts::collect().kvm;
    if !kvm.is_usable() {
        eprintln!("skipped: /dev/kvm cannot be opened ({kvm:?})");
        return None;
    }
    if let Err(error) = program::find() {
        eprintln!("skipped: {error} (build it with `cargo build -p forkd-vmm`)");
        return None;
    }
    test_image::machine(256, false)
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract() {
    let Some(machine) = machine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Kvm::new());
    check(&World::new(engine, machine, dir.path(), PATIENCE)).await;
}

async fn boot(machine: MachineSpec, dir: &std::path::Path) -> Result<Arc<dyn Vm>, Error> {
    let spec = BootSpec {
        id: "trouble".to_owned(),
        run_dir: dir.to_owned(),
        machine,
        memory_file: dir.join("ram"),
        lifetime: Lifetime::DieWithParent,
        slot: None,
    };
    Kvm::new().boot(spec).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_start_says_why_at_once() {
    let Some(machine) = machine() else { return };
    let garbage = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(garbage.path(), [0x5a; 100_000]).unwrap();
    let huge = tempfile::NamedTempFile::new().unwrap();
    huge.as_file().set_len(1 << 30).unwrap();
    let mut broken = vec![machine; 5];
    broken[0].kernel = "/no/such/kernel".into();
    broken[1].kernel = garbage.path().to_owned();
    broken[2].rootfs = "/no/such/rootfs".into();
    broken[3].initramfs = "/no/such/initramfs".into();
    broken[4].initramfs = huge.path().to_owned();
    let words = [
        "/no/such/kernel",
        "kernel",
        "/no/such/rootfs",
        "/no/such/initramfs",
        "initramfs",
    ];
    for (machine, word) in broken.into_iter().zip(words) {
        let dir = tempfile::tempdir().unwrap();
        let error = boot(machine, dir.path()).await.expect_err(word);
        assert!(matches!(error, Error::Control { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_guest_is_told_from_a_polite_one() {
    let Some(mut machine) = machine() else { return };
    machine.cmdline = "rdinit=/no/such/program".to_owned();
    let dir = tempfile::tempdir().unwrap();
    let vm = boot(machine, dir.path()).await.unwrap();
    let exit = tokio::time::timeout(PATIENCE, vm.exited()).await.unwrap();
    assert_eq!(exit, Exit::Reset);
    let console = std::fs::read_to_string(vm.console()).unwrap();
    assert!(console.contains("Kernel panic"), "{console}");
}

/// Every device of a Linux machine is there; how far its kernel gets does not matter.
#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_is_found_by_its_directory_and_its_siblings_are_left_alone() {
    let Some(machine) = startable() else { return };
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| {
        let place = dir.path().join(name);
        std::fs::create_dir(&place).unwrap();
        place
    };
    let users = |dir: &std::path::Path| -> Vec<u32> {
        let found = orphans::users(dir, &[program::PROGRAM]);
        found.iter().map(|user| user.pid).collect()
    };
    let parent_dir = place("parent-1");
    let parent = boot(machine.clone(), &parent_dir).await.unwrap();
    assert_eq!(users(&parent_dir), [parent.identity().pid]);
    let files = SnapshotFiles {
        memory: dir.path().join("memory.bin"),
        layers: vec![],
        state: dir.path().join("state.bin"),
    };
    let spec = SaveSpec {
        memory: SaveMemory::Full(files.memory.clone()),
        state: files.state.clone(),
    };
    parent.save(spec).await.unwrap();
    parent.kill().await.unwrap();
    let spec = TemplateSpec {
        id: "template-1".to_owned(),
        run_dir: place("template-1"),
        machine,
        files,
        lifetime: Lifetime::DieWithParent,
    };
    let template = Kvm::new().template(spec).await.unwrap();
    let fork = |name: &str| ForkSpec {
        id: name.to_owned(),
        run_dir: place(name),
        lifetime: Lifetime::Survive,
        slot: None,
    };
    let forks = template.fork(vec![fork("sb-1"), fork("sb-10")]).await;
    let [orphan, sibling] = <[_; 2]>::try_from(forks).unwrap().map(Result::unwrap);
    let (first, second) = (dir.path().join("sb-1"), dir.path().join("sb-10"));
    assert_eq!(users(&first), [orphan.identity().pid]);
    assert_eq!(users(&second), [sibling.identity().pid]);
    let kill =
        tokio::task::spawn_blocking(move || orphans::kill_users(&first, &[program::PROGRAM]));
    assert_eq!(kill.await.unwrap().unwrap().len(), 1);
    tokio::time::timeout(PATIENCE, orphan.exited())
        .await
        .unwrap();
    sibling.pause().await.unwrap();
    sibling.kill().await.unwrap();
    template.close().await.unwrap();
}
