//! Builds end to end with real tools, and a store that stays whole.

use std::io::Write;
use std::time::Instant;

use super::*;
use crate::tool::MKFS_EROFS;
use crate::{BuildRequest, Debian, KernelSource, Silent, Source, Step};

/// The smallest file that passes for a static program; only its bytes matter here.
fn agent(path: &Path, content: &str) {
    let mut elf = vec![0; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16] = 2;
    elf[18] = 62;
    elf[20] = 1;
    elf[52] = 64;
    elf.extend(content.as_bytes());
    fs::write(path, elf).unwrap();
}

/// A kernel and modules that fit together: a boot header with a version, and no modules but
/// built-in ones.
fn kernel(dir: &Path) -> KernelSource {
    let mut image = vec![0; 0x400];
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    image[0x300..0x30c].copy_from_slice(b"6.1.0-test \0");
    let (kernel, modules) = (dir.join("vmlinuz"), dir.join("modules"));
    fs::write(&kernel, image).unwrap();
    fs::create_dir(&modules).unwrap();
    let names = crate::modules::GUEST
        .iter()
        .map(|w| format!("kernel/{}.ko\n", w.name));
    fs::write(modules.join("modules.builtin"), names.collect::<String>()).unwrap();
    KernelSource::Files { kernel, modules }
}

struct World {
    dir: tempfile::TempDir,
    store: Store,
    request: BuildRequest,
}

/// A store, and a request for a small directory; nothing if the machine cannot pack one.
fn world() -> Option<World> {
    if let Err(error) = MKFS_EROFS.find() {
        println!("skipped: {error}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("My Root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::write(root.join("bin/sh"), "shell").unwrap();
    agent(&dir.path().join("agent"), "one");
    let mut request = BuildRequest::new(Source::Directory(root), &dir.path().join("agent"));
    request.kernel = kernel(dir.path());
    let store = Store::open(&dir.path().join("store")).unwrap();
    Some(World {
        dir,
        store,
        request,
    })
}

impl World {
    fn build(&self) -> crate::Built {
        self.store.build(&self.request, &mut Silent).unwrap()
    }

    fn count(&self, part: &str) -> usize {
        fs::read_dir(self.store.dir().join(part)).unwrap().count()
    }
}

#[test]
fn a_directory_becomes_an_image_once() {
    let Some(world) = world() else { return };
    let built = world.build();
    assert!(!built.reused);
    assert_eq!(built.image.name, "my-root");
    assert_eq!(built.image.kernel_version, "6.1.0-test");
    assert!(built.image.kernel.is_file() && built.image.initramfs.is_file());
    assert!(built.image.rootfs.is_file() && built.image.size_bytes > 0);
    assert_eq!(built.image.blob_paths().len(), 3);
    assert_eq!(world.count("tmp"), 0);

    let started = Instant::now();
    let again = world.build();
    assert!(again.reused);
    assert_eq!(again.image, built.image);
    assert!(
        started.elapsed() < Duration::from_millis(500),
        "{:?}",
        started.elapsed()
    );

    assert_eq!(world.store.get("my-root").unwrap().unwrap(), built.image);
    let prefix = &built.image.digest.as_str()[..8];
    assert_eq!(world.store.get(prefix).unwrap().unwrap(), built.image);
    assert_eq!(world.store.get("other").unwrap(), None);
    assert_eq!(world.store.get("../images").unwrap(), None);
    assert_eq!(world.store.list().unwrap(), [built.image]);
}

#[test]
fn a_new_agent_makes_a_new_initramfs_only() {
    let Some(world) = world() else { return };
    let first = world.build().image;
    agent(&world.dir.path().join("agent"), "two");
    let second = world.build();
    assert!(!second.reused);
    assert_eq!(second.image.rootfs, first.rootfs);
    assert_eq!(second.image.kernel, first.kernel);
    assert_ne!(second.image.initramfs, first.initramfs);
    assert_ne!(second.image.digest, first.digest);

    // The first one stays until nobody needs it.
    let names: Vec<String> = world
        .store
        .list()
        .unwrap()
        .into_iter()
        .map(|i| i.name)
        .collect();
    let displaced = format!("my-root@{}", first.digest.short());
    assert_eq!(names, ["my-root", &displaced]);
    let found = world.store.get(first.digest.as_str()).unwrap().unwrap();
    assert_eq!(found.initramfs, first.initramfs);
    assert!(
        world
            .store
            .prune(&|image| image.digest == first.digest)
            .unwrap()
            .is_empty()
    );
    assert_eq!(world.store.prune(&|_| false).unwrap(), [displaced]);
    assert!(!first.initramfs.exists() && second.image.initramfs.exists());
}

#[test]
fn a_changed_directory_is_packed_again() {
    let Some(world) = world() else { return };
    let first = world.build().image;
    let Source::Directory(root) = &world.request.source else {
        unreachable!()
    };
    fs::write(root.join("bin/sh"), "SHELL").unwrap();
    let second = world.build();
    assert!(!second.reused);
    assert_ne!(second.image.rootfs, first.rootfs);
}

#[test]
fn removing_drops_only_what_nobody_else_uses() {
    let Some(mut world) = world() else { return };
    world.request.name = Some("a".into());
    let a = world.build().image;
    world.request.name = Some("b".into());
    let b = world.build();
    assert!(b.reused, "another name for the same parts");
    assert_eq!(a.digest, b.image.digest);
    world.store.remove("a").unwrap();
    assert!(b.image.rootfs.exists());
    assert!(matches!(world.store.remove("a"), Err(Error::NotFound(_))));
    world.store.remove("b").unwrap();
    for part in ["images", "blobs", "inputs", "tmp"] {
        assert_eq!(world.count(part), 0, "{part}");
    }
}

#[test]
fn a_damaged_part_is_noticed_and_built_again() {
    let Some(world) = world() else { return };
    let image = world.build().image;
    let file = File::options().write(true).open(&image.rootfs).unwrap();
    file.set_len(100).unwrap();
    assert!(matches!(
        world.store.get("my-root"),
        Err(Error::Incomplete { .. })
    ));
    assert!(world.store.list().unwrap().is_empty());
    let again = world.build();
    assert!(!again.reused);
    assert_eq!(again.image.digest, image.digest);
    assert_eq!(
        world.store.get("my-root").unwrap().unwrap().rootfs,
        image.rootfs
    );
}

#[test]
fn damaged_and_foreign_records_say_so() {
    let Some(world) = world() else { return };
    let image = world.build().image;
    let record = image.dir.join("image.json");
    let good = fs::read_to_string(&record).unwrap();

    fs::write(
        &record,
        good.replace("\"schema_version\": 1", "\"schema_version\": 9"),
    )
    .unwrap();
    let text = world.store.get("my-root").unwrap_err().to_string();
    assert!(
        text.contains("format 9") && text.contains("format 1"),
        "{text}"
    );

    File::create(&record)
        .unwrap()
        .write_all(&good.as_bytes()[..40])
        .unwrap();
    let text = world.store.get("my-root").unwrap_err().to_string();
    assert!(
        text.contains("damaged") && text.contains("image.json"),
        "{text}"
    );

    // Building the same again puts it right.
    assert_eq!(world.build().image.digest, image.digest);
    assert!(world.store.get("my-root").is_ok());
}

#[test]
fn what_a_killed_build_left_is_swept_unless_another_is_at_work() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let left = dir.path().join("tmp/1-1/root/etc");
    fs::create_dir_all(&left).unwrap();
    let lock = store.lock(&mut Silent).unwrap();
    Store::open(dir.path()).unwrap();
    assert!(left.exists());
    drop(lock);
    Store::open(dir.path()).unwrap();
    assert!(!dir.path().join("tmp/1-1").exists());
}

#[test]
fn a_cancelled_build_leaves_nothing() {
    struct Cancelled;
    impl Progress for Cancelled {
        fn step(&mut self, _: &Step) {}
        fn message(&mut self, _: &str) {}
        fn cancelled(&self) -> bool {
            true
        }
    }
    let Some(world) = world() else { return };
    let error = world
        .store
        .build(&world.request, &mut Cancelled)
        .unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let _held = world.store.lock(&mut Silent).unwrap();
    let error = world
        .store
        .build(&world.request, &mut Cancelled)
        .unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    for part in ["images", "blobs", "tmp"] {
        assert_eq!(world.count(part), 0, "{part}");
    }
}

#[test]
fn bad_requests_fail_before_anything_happens() {
    let Some(mut world) = world() else { return };
    let refused = |change: &dyn Fn(&mut BuildRequest), what: &str| {
        let mut request = world.request.clone();
        change(&mut request);
        let error = world.store.build(&request, &mut Silent).unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text += &format!(": {cause}");
            source = cause.source();
        }
        assert!(text.contains(what), "{text}");
    };
    refused(&|r| r.name = Some("../x".into()), "not an image name");
    refused(&|r| r.agent = "/bin/sh".into(), "linked dynamically");
    refused(&|r| r.agent = "/no/agent".into(), "/no/agent");
    refused(
        &|r| r.source = Source::Debian(Debian::new(["-x"])),
        "not a Debian package",
    );
    refused(&|r| r.source = Source::Oci("/no/oci".into()), "/no/oci");
    refused(
        &|r| r.extra_modules = vec!["../x".into()],
        "not a kernel module",
    );
    refused(
        &|r| r.extra_modules = vec!["kvm_amd".into()],
        "no module `kvm_amd`",
    );
    let not = KernelSource::Files {
        kernel: "/bin/sh".into(),
        modules: "/etc".into(),
    };
    refused(&|r| r.kernel = not.clone(), "boot header");
    world.request.name = None;
    assert_eq!(world.count("images"), 0);
    assert_eq!(world.count("tmp"), 0);
}

/// Chosen by `FORKD_TEST_DEBIAN`: downloads packages and takes a minute.
#[test]
fn a_debian_image_is_built_for_real() {
    if std::env::var_os("FORKD_TEST_DEBIAN").is_none() {
        println!("skipped: FORKD_TEST_DEBIAN is not set");
        return;
    }
    struct Printed(Instant);
    impl Progress for Printed {
        fn step(&mut self, step: &Step) {
            println!(
                "{:6.1?} [{}/{}] {}",
                self.0.elapsed(),
                step.index,
                step.of,
                step.name
            );
        }
        fn message(&mut self, text: &str) {
            println!("{:6.1?}   {text}", self.0.elapsed());
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let dir =
        std::env::var_os("FORKD_TEST_STORE").map_or_else(|| dir.path().to_owned(), PathBuf::from);
    fs::create_dir_all(&dir).unwrap();
    let program = std::env::var_os("FORKD_TEST_AGENT").map(PathBuf::from);
    let program = program.unwrap_or_else(|| {
        agent(&dir.join("agent"), "agent");
        dir.join("agent")
    });
    let store = Store::open(&dir.join("store")).unwrap();
    let request = BuildRequest::new(Source::Debian(Debian::new(["python3-numpy"])), &program);
    let built = store.build(&request, &mut Printed(Instant::now())).unwrap();
    println!("{built:#?}");
    let started = Instant::now();
    let again = store.build(&request, &mut Silent).unwrap();
    println!("again: {:?}", started.elapsed());
    assert!(again.reused && started.elapsed() < Duration::from_millis(500));
}
