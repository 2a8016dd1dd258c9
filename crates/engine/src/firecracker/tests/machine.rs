//! Firecracker itself, with a guest of two instructions that counts: it needs no Linux, so any KVM runs it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_host::orphans;

use super::*;
use crate::{ForkSpec, LayerFiles, Lifetime, SaveMemory, SaveSpec, SnapshotFiles, Template, Vm};

/// Where the guest's code is loaded, and its counter beyond.
const CODE: u64 = 0x10_0000;
const COUNTER: u64 = CODE + 0x1000;
/// A user that nobody else on a test machine has.
const USER: u32 = 4_000_200;
/// Long enough to count at least once, on a busy machine.
const A_WHILE: Duration = Duration::from_millis(200);

/// An ELF file of one segment: `again: inc qword [counter]; jmp again`.
fn kernel() -> Vec<u8> {
    let distance = (COUNTER - (CODE + 7)) as u32;
    let mut code = vec![0x48, 0xff, 0x05];
    code.extend(distance.to_le_bytes());
    code.extend([0xeb, 0xf7]);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    // An executable for x86-64; its entry; one program header, right behind this one.
    put(&2_u16.to_le_bytes());
    put(&62_u16.to_le_bytes());
    put(&1_u32.to_le_bytes());
    put(&CODE.to_le_bytes());
    put(&64_u64.to_le_bytes());
    put(&[0; 12]);
    for number in [64_u16, 56, 1, 0, 0, 0] {
        put(&number.to_le_bytes());
    }
    // To be loaded, readable and executable: where it is in the file and in memory.
    put(&1_u32.to_le_bytes());
    put(&5_u32.to_le_bytes());
    let size = code.len() as u64;
    for number in [120, CODE, CODE, size, size, 0x1000] {
        put(&number.to_le_bytes());
    }
    put(&code);
    elf
}

struct Yard {
    dir: tempfile::TempDir,
    engine: Firecracker,
    machine: MachineSpec,
}

impl Yard {
    fn new(jail: bool) -> Yard {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, content).unwrap();
            path
        };
        let machine = MachineSpec {
            vcpus: 1,
            memory_mib: 64,
            kernel: file("kernel", &kernel()),
            initramfs: file("initramfs", &[0; 512]),
            rootfs: file("rootfs", &[0; 4096]),
            cmdline: String::new(),
            network: false,
        };
        let engine = Firecracker::new(PROGRAM).with_jail(jail);
        Yard {
            dir,
            engine,
            machine,
        }
    }

    fn place(&self, id: &str) -> PathBuf {
        let path = self.dir.path().join(id);
        fs::create_dir(&path).unwrap();
        path
    }

    async fn boot(&self) -> Result<Arc<dyn Vm>, Error> {
        let run_dir = self.place("boot");
        let spec = BootSpec {
            id: "boot".to_owned(),
            memory_file: run_dir.join("ram"),
            run_dir,
            machine: self.machine.clone(),
            lifetime: Lifetime::DieWithParent,
            slot: None,
        };
        self.engine.boot(spec).await
    }

    async fn template(&self, id: &str, files: SnapshotFiles) -> Arc<dyn Template> {
        let spec = TemplateSpec {
            id: id.to_owned(),
            run_dir: self.place(id),
            machine: self.machine.clone(),
            files,
            lifetime: Lifetime::DieWithParent,
        };
        self.engine.template(spec).await.unwrap()
    }

    async fn fork(
        &self,
        template: &Arc<dyn Template>,
        id: &str,
        lifetime: Lifetime,
    ) -> Arc<dyn Vm> {
        let spec = ForkSpec {
            id: id.to_owned(),
            run_dir: self.place(id),
            lifetime,
            slot: Some(SlotHandles {
                uid: Some(USER),
                ..SlotHandles::NONE
            }),
        };
        template.fork(vec![spec]).await.remove(0).unwrap()
    }

    /// Saves in full. Answers the files, and what the guest had counted.
    async fn full(&self, vm: &Arc<dyn Vm>, name: &str) -> (SnapshotFiles, u64) {
        let dir = self.place(name);
        let files = SnapshotFiles {
            memory: dir.join("memory.bin"),
            layers: vec![],
            state: dir.join("state.bin"),
        };
        let spec = SaveSpec {
            memory: SaveMemory::Full(files.memory.clone()),
            state: files.state.clone(),
        };
        vm.save(spec).await.unwrap();
        let left: Vec<_> = fs::read_dir(&dir).unwrap().flatten().collect();
        assert_eq!(left.len(), 2, "{left:?}");
        let counted = counted(&files.memory);
        (files, counted)
    }

    async fn layer(
        &self,
        vm: &Arc<dyn Vm>,
        name: &str,
        below: &SnapshotFiles,
    ) -> (SnapshotFiles, u64) {
        let dir = self.place(name);
        let layer = LayerFiles {
            memory: dir.join("memory.bin"),
            index: dir.join("layer.idx"),
        };
        let mut files = below.clone();
        files.layers.push(layer.clone());
        files.state = dir.join("state.bin");
        let counter = layer.memory.clone();
        let spec = SaveSpec {
            memory: SaveMemory::Layer(layer),
            state: files.state.clone(),
        };
        let report = vm.save(spec).await.unwrap();
        assert!(report.memory_bytes < 1 << 20, "{report:?}");
        (files, counted(&counter))
    }
}

fn counted(memory: &Path) -> u64 {
    let mut bytes = [0; 8];
    File::open(memory)
        .unwrap()
        .read_exact_at(&mut bytes, COUNTER)
        .unwrap();
    u64::from_le_bytes(bytes)
}

fn status(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    let tidy = |value: &str| value.trim().replace('\t', " ");
    pairs
        .map(|(name, value)| (name.to_owned(), tidy(value)))
        .collect()
}

/// Boot, save, template, fork, pause, layer, fork of the layer, adoption: the guest counts on from where it was.
async fn whole_life(jail: bool) {
    let yard = Yard::new(jail);
    let booted = yard.boot().await.unwrap();
    assert!(
        !yard.dir.path().join("boot/vmlinux").exists(),
        "the unpacked kernel is left over"
    );
    tokio::time::sleep(A_WHILE).await;
    let (frozen, first) = yard.full(&booted, "frozen").await;
    tokio::time::sleep(A_WHILE).await;
    let (_, second) = yard.full(&booted, "again").await;
    assert!(0 < first && first < second, "{first} {second}");
    booted.kill().await.unwrap();

    // As a daemon with a strict umask would have written it.
    let secret = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&frozen.memory, secret).unwrap();
    let template = yard.template("template", frozen.clone()).await;
    let fork = yard.fork(&template, "fork", Lifetime::Survive).await;
    tokio::time::sleep(A_WHILE).await;
    fork.pause().await.unwrap();
    let (layered, third) = yard.layer(&fork, "layer", &frozen).await;
    let (_, same) = yard.full(&fork, "full").await;
    assert!(third > first && same == third, "{first} {third} {same}");
    assert_eq!(counted(&frozen.memory), first, "a fork wrote to its base");
    fork.resume().await.unwrap();
    let above = yard.template("above", layered).await;
    template.close().await.unwrap();

    // The next daemon finds it, though its template is gone.
    let identity = fork.identity();
    drop(fork);
    let run_dir = yard.dir.path().join("fork");
    assert_eq!(orphans::users(&run_dir, &[PROGRAM])[0].pid, identity.pid);
    let adopted = yard
        .engine
        .adopt(identity, "fork", &run_dir)
        .await
        .unwrap()
        .unwrap();
    let (_, fourth) = yard.layer(&adopted, "later", &frozen).await;
    assert!(fourth > third, "{third} {fourth}");
    adopted.kill().await.unwrap();

    let fork = yard
        .fork(&above, "fork-of-fork", Lifetime::DieWithParent)
        .await;
    tokio::time::sleep(A_WHILE).await;
    let (_, fifth) = yard.full(&fork, "last").await;
    assert!(fifth > third, "{third} {fifth}");
    if jail {
        confined(&fork);
    }
    fork.kill().await.unwrap();
    above.close().await.unwrap();
    let kept: Vec<_> = fs::read_dir(yard.dir.path().join("above"))
        .unwrap()
        .collect();
    assert!(kept.is_empty(), "{kept:?}");
}

fn confined(vm: &Arc<dyn Vm>) {
    let pid = vm.identity().pid;
    let status = status(pid);
    assert_eq!(
        status["Uid"],
        [USER; 4].map(|user| user.to_string()).join(" ")
    );
    assert_eq!((&status["Gid"], &*status["Groups"]), (&status["Uid"], ""));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"]), ("1", "2"));
    // Ours, two, and one of its own.
    assert_eq!(status["Seccomp_filters"], "3");
    let of = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["mnt", "net", "ipc", "uts", "pid"] {
        assert_ne!(of(&pid.to_string(), kind), of("self", kind), "{kind}");
    }
    let root = fs::read_dir(format!("/proc/{pid}/root")).unwrap().flatten();
    let mut root: Vec<_> = root
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    root.sort_unstable();
    root.retain(|name| !["lib", "lib64", "usr"].contains(&name.as_str()));
    let expected = [
        "dev",
        "dump",
        "firecracker",
        "initramfs",
        "kernel",
        "memory",
        "proc",
        "rootfs",
        "state",
        "vm",
    ];
    assert_eq!(root, expected);
    let dump = fs::metadata(format!("/proc/{pid}/root/dump")).unwrap();
    assert_eq!(dump.len(), 0, "a file is still lent");
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_counts_on_through_its_whole_life_in_a_jail() {
    if !startable() || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root, or no firecracker");
        return;
    }
    let enforced = Firecracker::new(PROGRAM).enforcement().await;
    assert!(
        enforced.iter().all(|(_, is)| *is == Enforcement::Enforced),
        "{enforced:?}"
    );
    whole_life(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_counts_on_through_its_whole_life_without_a_jail() {
    if startable() {
        whole_life(false).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_start_says_why_at_once() {
    if !startable() {
        return;
    }
    type Break = fn(&mut MachineSpec);
    let breaks: [(&str, Break); 5] = [
        ("/no/such/kernel", |m| m.kernel = "/no/such/kernel".into()),
        ("/no/such/initramfs", |m| {
            m.initramfs = "/no/such/initramfs".into()
        }),
        ("/no/such/rootfs", |m| m.rootfs = "/no/such/rootfs".into()),
        ("unpack the kernel", |m| m.kernel = m.rootfs.clone()),
        ("set up the machine", |m| m.vcpus = 1000),
    ];
    for (words, broken) in breaks {
        let mut yard = Yard::new(true);
        broken(&mut yard.machine);
        let error = yard.boot().await.expect_err(words);
        assert!(error.to_string().contains(words), "{error}");
        let run_dir = yard.dir.path().join("boot");
        assert!(!run_dir.join("vmlinux").exists());
        // It is killed, and on a busy machine takes its time.
        let began = Instant::now();
        while !orphans::users(&run_dir, &[PROGRAM]).is_empty() {
            assert!(began.elapsed() < Duration::from_secs(10), "{words}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_vms_may_not_read_is_named() {
    if !startable() || !rustix::process::geteuid().is_root() {
        return;
    }
    let yard = Yard::new(true);
    let secret = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&yard.machine.rootfs, secret).unwrap();
    let error = forkd_host::chain(&yard.boot().await.unwrap_err());
    assert!(
        error.contains("rootfs") && error.contains("chmod o+r"),
        "{error}"
    );
}
