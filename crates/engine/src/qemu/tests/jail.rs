//! Real guests in and out of the jail: what confines their processes, and what that costs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{PATIENCE, machine};
use crate::contract::World;
use crate::qemu::{Accel, PROGRAM, Qemu};
use crate::{Enforcement, Engine, SlotHandles, Template, Vm};

/// Forks measured of each kind.
const ROUNDS: usize = 15;
/// A user that nobody else on a test machine has.
const USER: u32 = 4_000_100;

fn status(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.trim().replace('\t', " ")))
        .collect()
}

fn check_confined(vm: &Arc<dyn Vm>, user: Option<u32>) {
    let pid = vm.identity().pid;
    let status = status(pid);
    let users: Vec<u32> = status["Uid"]
        .split(' ')
        .map(|u| u.parse().unwrap())
        .collect();
    assert!(users.iter().all(|u| *u == users[0]) && users[0] != 0);
    assert!(user.is_none_or(|user| user == users[0]), "{users:?}");
    assert_eq!(status["Uid"], status["Gid"]);
    assert_eq!(status["Groups"], "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(
        (&*status["NoNewPrivs"], &*status["Seccomp"]),
        ("1", "2"),
        "{status:?}"
    );
    let of = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["mnt", "net", "ipc", "uts", "pid"] {
        assert_ne!(of(&pid.to_string(), kind), of("self", kind), "{kind}");
    }
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    assert!(!root.join("etc/shadow").exists() && !root.join("dev").exists());
    assert!(root.join("usr/bin").exists());
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert_eq!(environment, b"");
    // No directory of the host, no device but what is given.
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let Ok(to) = fs::read_link(fd.path()) else {
            continue;
        };
        assert!(!Path::new(&to).is_dir() || to == Path::new("/"), "{to:?}");
    }
}

/// A snapshot under this engine, and what forks of it take.
struct Forks {
    world: World,
    template: Arc<dyn Template>,
    took: Vec<Duration>,
}

impl Forks {
    async fn make(jail: bool, dir: &Path) -> Option<Forks> {
        fs::create_dir(dir).unwrap();
        let engine = Arc::new(Qemu::new(PROGRAM, Accel::Tcg).with_jail(jail));
        let enforced = engine.enforcement().await;
        let all = enforced.iter().all(|(_, is)| *is == Enforcement::Enforced);
        assert!(enforced.len() >= 6);
        if jail && rustix::process::geteuid().is_root() {
            assert!(all, "{enforced:?}");
        }
        if !jail {
            assert!(enforced.iter().all(|(_, is)| *is != Enforcement::Enforced));
        }
        let world = World::new(engine, machine()?, dir, PATIENCE);
        let frozen = world.freeze().await;
        let began = Instant::now();
        let template = world.template(frozen.files).await.unwrap();
        eprintln!("jail {jail}: template in {:?}", began.elapsed());
        Some(Forks {
            world,
            template,
            took: Vec::new(),
        })
    }

    async fn fork(&mut self) -> Arc<dyn Vm> {
        let mut spec = self.world.fork_spec();
        let run_dir = spec.run_dir.clone();
        spec.slot = Some(SlotHandles {
            uid: Some(USER),
            ..SlotHandles::NONE
        });
        let began = Instant::now();
        let vm = self.template.fork(vec![spec]).await.remove(0).unwrap();
        self.world.agent(&vm).await;
        self.took.push(began.elapsed());
        // Whoever has no record of it finds it all the same.
        let users = forkd_host::orphans::users(&run_dir, &[PROGRAM]);
        assert!(users.iter().any(|user| user.pid == vm.identity().pid));
        vm
    }

    fn median(&mut self) -> Duration {
        self.took.sort_unstable();
        self.took[self.took.len() / 2]
    }
}

/// What sealed files of this process take.
fn sealed_kib() -> u64 {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let name = |path: &Path| fs::read_link(path).unwrap_or_default();
    let sealed = open
        .map(|entry| entry.path())
        .filter(|path| name(path).to_string_lossy().contains("memfd:forkd-"));
    let blocks = sealed.filter_map(|path| fs::metadata(path).ok());
    let blocks = blocks.map(|file| std::os::unix::fs::MetadataExt::blocks(&file));
    // A file may be open more than once.
    blocks.max().unwrap_or(0) / 2
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_the_jail_is_confined_and_forks_as_fast() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    if machine().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut jailed = Forks::make(true, &dir.path().join("on")).await.unwrap();
    let mut free = Forks::make(false, &dir.path().join("off")).await.unwrap();
    for round in 0..ROUNDS {
        let vm = jailed.fork().await;
        check_confined(&vm, Some(USER));
        vm.kill().await.unwrap();
        let vm = free.fork().await;
        if round == 0 {
            let status = status(vm.identity().pid);
            assert_eq!((&*status["Uid"], &*status["Seccomp"]), ("0 0 0 0", "0"));
        }
        vm.kill().await.unwrap();
    }
    eprintln!("memory of the jailed template: {} KiB", sealed_kib());
    let (on, off) = (jailed.median(), free.median());
    let ratio = on.as_secs_f64() / off.as_secs_f64();
    eprintln!("fork until the agent answers, p50: jail on {on:?}, off {off:?}: {ratio:.2}");
    // Side by side; on a busy machine even that wavers.
    assert!(ratio < 2.0, "{ratio}");
}
