//! Machines of the monitor's own test guest: a few instructions that run wherever /dev/kvm opens.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forkd_wire::vmm::Request;

use super::super::client;
use super::super::process::{self, Launch, Monitor, number};
use super::super::program;
use super::super::vm::{Inner, KvmVm, Place};
use crate::{
    ForkSpec, LayerFiles, Lifetime, MachineSpec, SaveMemory, SaveSpec, SnapshotFiles, TemplateSpec,
    Vm,
};

const MEMORY_MIB: u64 = 64;
/// How long anything may take beside other tests.
const PATIENCE: Duration = Duration::from_secs(60);
/// The guest's commands: see the monitor's `guest`.
const FILL: u32 = 1;
const SUM: u32 = 2;
pub(super) const CRASH: u32 = 6;
/// What the guest reports when it first runs.
const ALIVE: u64 = 1 << 32;
/// The pages that tests write and sum up, far from the guest's code.
const PAGES: [u32; 2] = [1024, 200];

/// Where machines are made, and with what.
#[derive(Debug)]
pub(super) struct Yard {
    pub(super) dir: tempfile::TempDir,
    pub(super) program: PathBuf,
}

impl Yard {
    /// `None`, and why on the output: nothing can be tested here.
    pub(super) fn new() -> Option<Yard> {
        let kvm = forkd_host::facts::Facts::collect().kvm;
        if !kvm.is_usable() {
            eprintln!("skipped: /dev/kvm cannot be opened ({kvm:?})");
            return None;
        }
        match program::find() {
            Ok(program) => Some(Yard {
                dir: tempfile::tempdir().unwrap(),
                program,
            }),
            Err(error) => {
                eprintln!("skipped: {error} (build it with `cargo build -p forkd-vmm`)");
                None
            }
        }
    }

    fn machine() -> MachineSpec {
        MachineSpec {
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            rootfs: PathBuf::new(),
            cmdline: String::new(),
            network: true,
        }
    }

    pub(super) fn directory(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    pub(super) async fn boot(&self) -> Arc<KvmVm> {
        let dir = self.directory("booted");
        let place = Place::make("booted", &dir, true, Lifetime::DieWithParent).unwrap();
        let (ours, theirs) = client::pair().unwrap();
        let args = [
            "boot",
            "--test-guest",
            "--control-fd",
            &number(&theirs).to_string(),
            "--memory",
            &MEMORY_MIB.to_string(),
            "--mac",
            "02:00:00:00:00:01",
        ];
        let launch = Launch {
            program: self.program.clone(),
            args: args.map(Into::into).to_vec(),
            ours,
            inherit: vec![theirs],
            die_with_parent: true,
            cgroup: None,
        };
        let monitor = process::start(launch).await.unwrap();
        monitor.running("boot", PATIENCE).await.unwrap();
        KvmVm::new(monitor, place)
    }

    /// Boots, saves, kills; answers the files.
    pub(super) async fn freeze(&self) -> SnapshotFiles {
        let vm = self.boot().await;
        report(vm.inner(), |value| value == ALIVE).await;
        let dir = self.directory("frozen");
        let files = SnapshotFiles {
            memory: dir.join("memory.bin"),
            layers: vec![],
            state: dir.join("state.bin"),
        };
        let spec = SaveSpec {
            memory: SaveMemory::Full(files.memory.clone()),
            state: files.state.clone(),
        };
        let saved = vm.save(spec).await.unwrap();
        assert!(
            saved.memory_bytes > 0 && saved.memory_bytes < 4 << 20,
            "{saved:?}"
        );
        vm.kill().await.unwrap();
        files
    }

    pub(super) fn template_spec(&self, id: &str, files: SnapshotFiles) -> TemplateSpec {
        TemplateSpec {
            id: id.to_owned(),
            run_dir: self.directory(id),
            machine: Yard::machine(),
            files,
            lifetime: Lifetime::DieWithParent,
        }
    }

    pub(super) fn fork_spec(&self, id: &str, lifetime: Lifetime) -> ForkSpec {
        ForkSpec {
            id: id.to_owned(),
            run_dir: self.directory(id),
            lifetime,
            slot: None,
        }
    }

    pub(super) fn layer(&self, name: &str) -> (LayerFiles, PathBuf) {
        let dir = self.directory(name);
        let files = LayerFiles {
            memory: dir.join("memory.bin"),
            index: dir.join("memory.idx"),
        };
        (files, dir.join("state.bin"))
    }
}

/// Waits for a report of the test guest that is wanted, and forgets nothing of what was reported.
async fn report(vm: &Inner, mut wanted: impl FnMut(u64) -> bool) -> u64 {
    let mut seen = vm.monitor.client().seen();
    let told = seen.wait_for(|seen| seen.reports.iter().any(|value| wanted(*value)) || seen.closed);
    let told = tokio::time::timeout(PATIENCE, told)
        .await
        .expect("a report");
    let found = told.unwrap().reports.iter().copied().find(|v| wanted(*v));
    found.expect("the guest reports before it ends")
}

/// Gives the test guest a command and waits for its report.
async fn run(monitor: &Monitor, op: u32, args: [u32; 3]) -> u64 {
    let mut seen = monitor.client().seen();
    let before = seen.borrow().reports.len();
    // The guest has no answer but its report.
    let request = Request::Guest { op, args };
    let asked = monitor
        .client()
        .ask(&request, &[], Duration::from_millis(1));
    let _ = asked.await;
    let told = seen.wait_for(|seen| seen.reports.len() > before || seen.closed);
    let told = tokio::time::timeout(PATIENCE, told)
        .await
        .expect("a report");
    let value = told.unwrap().reports.get(before).copied();
    value.expect("the guest reports before it ends")
}

/// Talks to the test guest of a process, as one who knows how it is held.
pub(super) async fn command(vm: &KvmVm, op: u32) {
    let request = Request::Guest { op, args: [0; 3] };
    let asked = vm.inner().monitor.client();
    let _ = asked.ask(&request, &[], Duration::from_millis(1)).await;
}

/// Writes pages that begin with this number.
pub(super) async fn fill(vm: &KvmVm, first: u32) {
    alive(vm).await;
    let [page, count] = PAGES;
    assert_eq!(
        run(&vm.inner().monitor, FILL, [page, count, first]).await,
        0
    );
}

/// Checks that the pages begin with this number; 0 for pages that nobody wrote.
pub(super) async fn assert_filled(vm: &KvmVm, first: u32) {
    alive(vm).await;
    let [page, count] = PAGES;
    let found = run(&vm.inner().monitor, SUM, [page, count, 0]).await;
    let values = (0..count).map(|at| if first == 0 { 0 } else { first + at });
    let sum = values.fold(0_u32, |sum, value| sum.rotate_left(1).wrapping_add(value));
    assert_eq!(found, u64::from(sum), "not filled from {first}");
}

async fn alive(vm: &KvmVm) {
    report(vm.inner(), |value| value == ALIVE).await;
}
