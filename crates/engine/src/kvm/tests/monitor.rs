//! The engine over the real monitor, natively.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::super::template::KvmTemplate;
use super::super::vm::KvmVm;
use super::super::{Kvm, template};
use super::machine::{self, Yard, assert_filled, fill};
use crate::{
    BranchSpec, Engine, Error, Exit, ForkSpec, Lifetime, SaveMemory, SaveSpec, SlotHandles,
    SnapshotFiles, Template, Vm,
};

const PROMPT: Duration = Duration::from_secs(30);

/// A template and forks of it, as the engine's own types.
async fn load(yard: &Yard, id: &str, files: SnapshotFiles) -> Arc<KvmTemplate> {
    let spec = yard.template_spec(id, files);
    Arc::new(
        template::KvmTemplate::load(spec, yard.program.clone(), true)
            .await
            .unwrap(),
    )
}

async fn fork(template: &KvmTemplate, spec: ForkSpec) -> Arc<KvmVm> {
    template.fork_typed(spec).await.unwrap()
}

fn tied(yard: &Yard, id: &str) -> ForkSpec {
    yard.fork_spec(id, Lifetime::DieWithParent)
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_are_isolated_and_layers_hold_what_was_written() {
    let Some(yard) = Yard::new() else { return };
    let base = yard.freeze().await;
    let template = load(&yard, "base", base.clone()).await;
    let one = fork(&template, tied(&yard, "one")).await;
    let two = fork(&template, tied(&yard, "two")).await;
    fill(&one, 7).await;
    assert_filled(&two, 0).await;
    fill(&two, 90).await;
    assert_filled(&one, 7).await;
    one.pause().await.unwrap();
    one.pause().await.unwrap();
    let (files, state) = yard.layer("layer");
    let spec = SaveSpec {
        memory: SaveMemory::Layer(files.clone()),
        state: state.clone(),
    };
    let saved = one.save(spec.clone()).await.unwrap();
    assert!(
        saved.memory_bytes >= 200 * 4096 && saved.memory_bytes < 4 << 20,
        "{saved:?}"
    );
    one.save(spec).await.expect_err("the files exist");
    one.resume().await.unwrap();
    assert_filled(&one, 7).await;
    let mut layered = base;
    layered.layers.push(files);
    layered.state = state;
    let above = load(&yard, "above", layered).await;
    let three = fork(&above, tied(&yard, "three")).await;
    assert_filled(&three, 7).await;
    for vm in [one, two, three] {
        vm.kill().await.unwrap();
        vm.kill().await.unwrap();
        assert_eq!(vm.exited().await, Exit::Signal(9));
    }
    for template in [template, above] {
        assert!(template.is_alive());
        template.close().await.unwrap();
        assert!(!template.is_alive());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_of_a_branch_is_forked_before_either_is_written() {
    let Some(yard) = Yard::new() else { return };
    let base = yard.freeze().await;
    let template = load(&yard, "base", base.clone()).await;
    let one = fork(&template, tied(&yard, "one")).await;
    fill(&one, 11).await;
    let (first_files, first_state) = yard.layer("first");
    let first_spec = BranchSpec {
        files: first_files.clone(),
        state: first_state.clone(),
    };
    let first = one.branch_typed().await.unwrap();
    assert_eq!(first.base, "base");
    fill(&one, 500).await;
    one.kill().await.unwrap();
    template.close().await.unwrap();
    let two = fork(&first.template, tied(&yard, "two")).await;
    assert_filled(&two, 11).await;
    fill(&two, 22).await;
    let (files, state) = yard.layer("second");
    let spec = BranchSpec {
        files: files.clone(),
        state: state.clone(),
    };
    let second = two.branch_typed().await.unwrap();
    assert_eq!(second.base, "base");
    two.kill().await.unwrap();
    let three = fork(&second.template, tied(&yard, "three")).await;
    assert_filled(&three, 22).await;
    let (wrote_first, wrote_second) = tokio::join!(
        first.template.write(first_spec),
        second.template.write(spec)
    );
    assert!(wrote_first.unwrap() < 4 << 20);
    assert!(wrote_second.unwrap() < 4 << 20);
    for (id, files, state, value) in [
        ("from-first", first_files, first_state, 11),
        ("from-second", files, state, 22),
    ] {
        let mut layered = base.clone();
        layered.layers.push(files);
        layered.state = state;
        let template = load(&yard, id, layered).await;
        let vm = fork(&template, tied(&yard, &format!("vm-{id}"))).await;
        assert_filled(&vm, value).await;
        vm.kill().await.unwrap();
        template.close().await.unwrap();
    }
    assert_filled(&three, 22).await;
    three.kill().await.unwrap();
    first.template.close().await.unwrap();
    second.template.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_leaves_the_branch_in_memory_until_there_is_space() {
    let Some(yard) = Yard::new() else { return };
    let base = yard.freeze().await;
    let template = load(&yard, "base", base.clone()).await;
    let vm = fork(&template, tied(&yard, "one")).await;
    fill(&vm, 3).await;
    let Some(disk) = SmallDisk::mount(&yard.directory("small")) else {
        return;
    };
    let spec = BranchSpec {
        files: crate::LayerFiles {
            memory: disk.0.join("memory.bin"),
            index: disk.0.join("memory.idx"),
        },
        state: disk.0.join("state.bin"),
    };
    let branch = vm.branch_typed().await.unwrap();
    // Twice: at once it may be asked again.
    for _ in 0..2 {
        let error = branch.template.write(spec.clone()).await.unwrap_err();
        let Error::File { source, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        let left = std::fs::read_dir(&disk.0).unwrap().count();
        assert_eq!(left, 0, "files are left");
    }
    assert!(branch.template.is_alive());
    let two = fork(&branch.template, tied(&yard, "two")).await;
    assert_filled(&two, 3).await;
    fill(&two, 900).await;
    disk.grow();
    branch.template.write(spec.clone()).await.unwrap();
    branch.template.close().await.unwrap();
    template.close().await.unwrap();
    let mut layered = base;
    layered.layers.push(spec.files);
    layered.state = spec.state;
    let loaded = load(&yard, "loaded", layered).await;
    let three = fork(&loaded, tied(&yard, "three")).await;
    assert_filled(&three, 3).await;
    for vm in [vm, two, three] {
        vm.kill().await.unwrap();
    }
    loaded.close().await.unwrap();
}

/// A file system of 256 KiB.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Option<SmallDisk> {
        let flags = rustix::mount::MountFlags::empty();
        let options = Some(c"size=256k");
        match rustix::mount::mount("forkd-test", at, "tmpfs", flags, options) {
            Ok(()) => Some(SmallDisk(at.to_owned())),
            Err(error) => {
                eprintln!("skipped: cannot mount a small file system: {error}");
                None
            }
        }
    }
}

impl SmallDisk {
    /// There is space again.
    fn grow(&self) {
        let options = c"size=64m";
        rustix::mount::mount_remount(&self.0, rustix::mount::MountFlags::empty(), options).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_survives_is_adopted_and_what_is_tied_ends_with_its_socket() {
    let Some(yard) = Yard::new() else { return };
    let engine = Kvm::with_program(&yard.program);
    let template = load(&yard, "base", yard.freeze().await).await;
    let spec = yard.fork_spec("one", Lifetime::Survive);
    let dir = spec.run_dir.clone();
    let vm = fork(&template, spec).await;
    fill(&vm, 41).await;
    let identity = vm.identity();
    drop(vm);
    let nobody = engine.adopt(identity, "somebody-else", &dir).await;
    assert!(nobody.unwrap().is_none());
    let mut reused = identity;
    reused.start_ticks += 1;
    assert!(engine.adopt(reused, "one", &dir).await.unwrap().is_none());
    // Twice: also the socket of the daemon after the next one is taken.
    for _ in 0..2 {
        let vm = engine.adopt(identity, "one", &dir).await.unwrap().unwrap();
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
        let (files, state) = yard.layer(&format!("saved{}", rand_name()));
        let memory = SaveMemory::Layer(files);
        vm.save(SaveSpec { memory, state }).await.unwrap();
    }
    let vm = engine.adopt(identity, "one", &dir).await.unwrap().unwrap();
    vm.kill().await.unwrap();
    vm.exited().await;
    assert!(engine.adopt(identity, "one", &dir).await.unwrap().is_none());

    let tied = fork(&template, tied(&yard, "two")).await;
    let pid = tied.identity().pid;
    tied.inner().monitor.hang_up();
    let exit = tokio::time::timeout(PROMPT, tied.exited()).await.unwrap();
    assert_eq!(exit, Exit::Code(0));
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "not reaped");
    template.close().await.unwrap();
}

fn rand_name() -> u128 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_and_a_dead_template_are_told() {
    let Some(yard) = Yard::new() else { return };
    let template = load(&yard, "base", yard.freeze().await).await;
    let vm = fork(&template, tied(&yard, "one")).await;
    assert_filled(&vm, 0).await;
    machine::command(&vm, machine::CRASH).await;
    let exit = tokio::time::timeout(PROMPT, vm.exited()).await.unwrap();
    assert_eq!(exit, Exit::Reset);
    vm.pause().await.expect_err("it has ended");
    vm.dial().await.expect_err("it has ended");
    let pid = template.identity().unwrap().pid;
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let forked = template.fork(vec![tied(&yard, "two")]).await.remove(0);
    let error = forked.expect_err("the template is dead");
    assert!(matches!(error, Error::Exited { .. }), "{error:?}");
    assert!(!template.is_alive());
    template.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fan_out_leaves_nothing_behind() {
    let Some(yard) = Yard::new() else { return };
    const N: usize = 60;
    let template = load(&yard, "base", yard.freeze().await).await;
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    let specs = (0..N).map(|n| tied(&yard, &format!("vm{n}"))).collect();
    let forks = template.fork(specs).await;
    let pids: Vec<u32> = forks
        .iter()
        .map(|vm| vm.as_ref().unwrap().identity().pid)
        .collect();
    for vm in &forks {
        vm.as_ref().unwrap().kill().await.unwrap();
    }
    drop(forks);
    for pid in pids {
        assert!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "{pid} is left"
        );
    }
    let deadline = tokio::time::Instant::now() + PROMPT;
    while open() > before + 2 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "{} descriptors more",
            open() - before
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    template.close().await.unwrap();
}

/// A control group of a test's own.
struct Group(std::path::PathBuf);

impl Group {
    fn make(name: &str) -> Option<Group> {
        let mount = forkd_host::facts::Facts::collect().cgroup.v2;
        let dir =
            mount.map(|mount| mount.join(format!("forkd-test-{}-{name}", std::process::id())));
        match dir.clone().map(std::fs::create_dir) {
            Some(Ok(())) => dir.map(Group),
            why => {
                eprintln!("skipped: no control group can be made ({why:?})");
                None
            }
        }
    }

    fn slot(&self, uid: Option<u32>) -> Option<SlotHandles> {
        let dir = std::fs::File::open(&self.0).unwrap();
        Some(SlotHandles {
            cgroup: Some(dir.into()),
            uid,
            ..SlotHandles::NONE
        })
    }

    fn holds(&self, pid: u32) -> bool {
        let pids = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        pids.lines().any(|line| line == pid.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("{} is left: {error}", self.0.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_leaves_its_sandboxs_group_and_once_loaded_also_its_user() {
    let Some(yard) = Yard::new() else { return };
    let (Some(first), Some(second)) = (Group::make("first"), Group::make("second")) else {
        return;
    };
    let base = yard.freeze().await;
    let template = load(&yard, "base", base.clone()).await;
    assert!(template.gives_users());
    let mut spec = tied(&yard, "one");
    // Without privilege, as in production.
    spec.slot = first.slot(Some(65_534));
    let vm = fork(&template, spec).await;
    let pid = vm.identity().pid;
    assert!(first.holds(pid));
    assert_eq!(user(&vm), "65534");
    fill(&vm, 77).await;
    let (files, state) = yard.layer("layer");
    let branch = vm.branch_typed().await.unwrap();
    assert!(!branch.template.gives_users());
    let branched = branch.template.identity().unwrap().pid;
    assert!(!first.holds(branched), "it would end with its sandbox");
    vm.kill().await.unwrap();
    std::fs::write(first.0.join("cgroup.kill"), "1").unwrap();
    let mut spec = tied(&yard, "two");
    spec.slot = second.slot(Some(1000));
    let two = fork(&branch.template, spec).await;
    assert!(second.holds(two.identity().pid));
    assert_filled(&two, 77).await;
    assert_eq!(user(&two), "65534", "it has no privilege to become another");
    let mut layered = base;
    layered.layers.push(files.clone());
    layered.state = state.clone();
    let spec = BranchSpec { files, state };
    assert!(branch.template.write(spec).await.unwrap() > 0);
    two.kill().await.unwrap();
    branch.template.close().await.unwrap();
    template.close().await.unwrap();
    let loaded = load(&yard, "loaded", layered).await;
    assert!(loaded.gives_users());
    let mut spec = tied(&yard, "three");
    spec.slot = second.slot(Some(1001));
    let three = fork(&loaded, spec).await;
    assert_eq!(user(&three), "1001");
    assert_filled(&three, 77).await;
    three.kill().await.unwrap();
    loaded.close().await.unwrap();
}

/// The user that a VM runs as.
fn user(vm: &KvmVm) -> String {
    let status = format!("/proc/{}/status", vm.identity().pid);
    let status = std::fs::read_to_string(status).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("Uid:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}
