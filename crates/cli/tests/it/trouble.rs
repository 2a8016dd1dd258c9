//! Bad input and broken hosts: each a clear error with a remedy, and nothing left behind.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use forkd_cli::client::Client;
use forkd_wire::api::snapshot::CreateSnapshot;

use super::world::{IMAGE, Said, World};

#[test]
fn unknown_and_duplicate_names() {
    let Some(world) = World::seeded() else { return };
    world.run(["bench", "--tag", "nope"]).fails(1, &["nope"]);
    world.run(["rmi", "nope"]).fails(1, &["nope"]);
    world.run(["snapshot-info", "nope"]).fails(1, &["nope"]);
    world
        .run(["image", "rm", "nope", "--force"])
        .fails(1, &["nope", "image ls"]);
    world
        .run(["snapshot", "--tag", "x", "--image", "nope"])
        .fails(1, &["nope", "help: "]);
    world
        .run(["snapshot", "--tag", "seed", "--image", IMAGE])
        .fails(1, &["seed", "rmi seed"]);
    world
        .run(["image", "rm", IMAGE])
        .fails(1, &["seed", "help: "]);
    world.assert_clean(&["seed"]);
}

#[test]
fn a_warm_up_that_fails() {
    let Some(world) = World::new() else { return };
    let python = [
        "snapshot",
        "--tag",
        "x",
        "--image",
        IMAGE,
        "--warm",
        "import no_such_module",
    ];
    world.run(python).fails(1, &["no_such_module"]);
    let command = [
        "snapshot",
        "--tag",
        "x",
        "--image",
        IMAGE,
        "--warm-cmd",
        "echo why >&2; exit 3",
    ];
    world.run(command).fails(1, &["3", "why"]);
    world.assert_clean(&[]);
}

#[test]
fn without_qemu() {
    let Some(world) = World::seeded() else { return };
    let empty = world.dir().join("empty");
    fs::create_dir(&empty).unwrap();
    let without = |args: &[&str]| -> Said {
        let mut command = world.forkd(args.iter().copied());
        super::world::finish({
            command.env("PATH", &empty);
            command
        })
    };
    without(&["doctor"]).fails_doctor("apt-get install qemu-system-x86");
    without(&["quickstart"]).fails(1, &["help: "]);
    without(&["bench", "--tag", "seed", "--n", "1"]).fails(1, &["qemu"]);
    without(&["snapshot", "--tag", "x", "--image", IMAGE]).fails(1, &["qemu"]);
    world.assert_clean(&["seed"]);
}

impl Said {
    #[track_caller]
    fn fails_doctor(self, remedy: &str) {
        assert_eq!(self.code, Some(1), "{self:#?}");
        assert!(
            self.out.contains('✗') && self.out.contains(remedy),
            "{self:#?}"
        );
    }
}

#[test]
fn too_little_memory() {
    let Some(world) = World::new() else { return };
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    let mib = (total / 1024 + 4096).to_string();
    let said = world.run([
        "snapshot", "--tag", "big", "--image", IMAGE, "--memory", &mib,
    ]);
    // On a host with less disk than memory, the disk is what is missed first.
    assert!(
        said.err.contains("of memory are needed") || said.err.contains("free some"),
        "{said:#?}"
    );
    said.fails(1, &["MiB"]);
    world.assert_clean(&[]);
}

#[test]
fn too_little_disk() {
    let Some(world) = World::new() else { return };
    fs::create_dir_all(world.data()).unwrap();
    let disk = SmallDisk::mount(world.data(), "300m");
    let args = ["snapshot", "--tag", "x", "--image", IMAGE];
    world.run(args).fails(1, &["MiB free", "free some space"]);
    world.assert_clean(&[]);
    drop(disk);
}

/// A disk of a size of our choice.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, size: &str) -> SmallDisk {
        let option = format!("size={size}");
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &option, "forkd-test"])
            .arg(&at);
        assert!(
            mount.status().unwrap().success(),
            "mount at {}",
            at.display()
        );
        SmallDisk(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Damages the seed in one way; forking it is refused, removing it works.
fn damaged(damage: impl FnOnce(&Path), parts: &[&str]) {
    let Some(world) = World::seeded() else { return };
    damage(&world.snapshot("seed"));
    world
        .run(["bench", "--tag", "seed", "--n", "1"])
        .fails(1, parts);
    let list = world.run(["images"]);
    assert_eq!(list.code, Some(0), "{list:#?}");
    world.run(["rmi", "seed"]).ok();
    world.assert_clean(&[]);
}

#[test]
fn a_truncated_memory_file() {
    let damage = |dir: &Path| {
        let file = File::options()
            .write(true)
            .open(dir.join("memory.bin"))
            .unwrap();
        file.set_len(1 << 20).unwrap();
    };
    damaged(damage, &["memory.bin"]);
}

#[test]
fn a_missing_state_file() {
    damaged(
        |dir| fs::remove_file(dir.join("state.bin")).unwrap(),
        &["state.bin"],
    );
}

#[test]
fn a_corrupt_device_state() {
    let damage = |dir: &Path| {
        let mut file = File::options()
            .write(true)
            .open(dir.join("state.bin"))
            .unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&[0xff; 4096]).unwrap();
    };
    damaged(damage, &["error: "]);
}

#[test]
fn a_manifest_of_another_version() {
    let damage = |dir: &Path| {
        let path = dir.join("manifest.json");
        let text = fs::read_to_string(&path).unwrap();
        let text = text.replace("\"schema_version\": 1", "\"schema_version\": 999");
        fs::write(&path, text).unwrap();
    };
    damaged(damage, &["999"]);
}

#[test]
fn a_manifest_that_is_none() {
    damaged(
        |dir| fs::write(dir.join("manifest.json"), "{").unwrap(),
        &["manifest"],
    );
}

#[test]
fn a_corrupt_record_of_the_node() {
    let Some(world) = World::seeded() else { return };
    world.run(["images"]).ok();
    for log in ["state.db-wal", "state.db-shm"] {
        let _ = fs::remove_file(world.data().join(log));
    }
    fs::write(
        world.data().join("state.db"),
        b"this is no database at all, not at all",
    )
    .unwrap();
    let said = world.run(["images"]);
    assert_eq!(said.code, Some(1), "{said:#?}");
    assert!(
        said.err.contains("state.db") && said.err.contains("help: "),
        "{said:#?}"
    );
    fs::remove_file(world.data().join("state.db")).unwrap();
    world.assert_clean(&["seed"]);
}

#[test]
fn a_node_that_is_in_use() {
    let Some(world) = World::seeded() else { return };
    let daemon = world.serve();
    let said = world.run(["images"]);
    let pid = daemon.pid().to_string();
    said.fails(1, &[&pid, "help: "]);
    daemon.stop();
    world.assert_clean(&["seed"]);
}

/// Boots these files over the daemon's interface and gives what it says.
fn boot(initramfs: &[u8], timeout_secs: u64) -> Option<(World, String)> {
    let world = World::new()?;
    let images = std::env::var_os("FORKD_TEST_IMAGES")?;
    let store = forkd_image::Store::open(Path::new(&images)).unwrap();
    let image = store.get(IMAGE).unwrap().unwrap();
    let broken = world.dir().join("initramfs");
    fs::write(&broken, initramfs).unwrap();
    let daemon = world.serve();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let refused = runtime.block_on(async {
        let client = Client::web(&daemon.url, None).unwrap();
        let mut request = CreateSnapshot::of_image("x".parse().unwrap(), "");
        request.image = None;
        request.kernel = Some(image.kernel);
        request.initramfs = Some(broken);
        request.rootfs = Some(image.rootfs);
        request.boot_timeout_secs = Some(timeout_secs);
        client.create_snapshot(&request, |_| ()).await.unwrap_err()
    });
    daemon.stop();
    Some((world, refused.lines().join("\n")))
}

#[test]
fn a_guest_that_panics() {
    let Some((world, told)) = boot(b"no archive at all", 60) else {
        return;
    };
    assert!(told.to_lowercase().contains("panic"), "{told}");
    world.assert_clean(&[]);
}

#[test]
fn a_guest_that_never_becomes_ready() {
    // Too short for any guest in software emulation.
    let Some(world) = World::new() else { return };
    drop(world);
    let images = std::env::var_os("FORKD_TEST_IMAGES").unwrap();
    let store = forkd_image::Store::open(Path::new(&images)).unwrap();
    let initramfs = fs::read(store.get(IMAGE).unwrap().unwrap().initramfs).unwrap();
    let Some((world, told)) = boot(&initramfs, 1) else {
        return;
    };
    assert!(
        told.contains("boot") || told.contains("ready") || told.contains("answer"),
        "{told}"
    );
    world.assert_clean(&[]);
}
