//! The store on real directories: life of a snapshot, every kind of damage, locks, and content.

mod crash;
mod damage;
mod model;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use forkd_wire::layer::{Builder, Kind, PAGE_SIZE};

use super::*;
use crate::draft::{Draft, ManifestDraft, MemoryDraft};
use crate::manifest::{Image, Lineage, Machine};
use crate::remove::Dependents;

const PAGE: usize = PAGE_SIZE as usize;
const PAGES: u64 = 32;
const MEMORY_BYTES: u64 = PAGES * PAGE_SIZE;

struct World {
    dir: tempfile::TempDir,
    store: Store,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("snapshots")).unwrap();
    World { dir, store }
}

fn tag(text: &str) -> Tag {
    Tag::new(text).unwrap()
}

fn about(memory: MemoryDraft) -> ManifestDraft {
    ManifestDraft {
        engine: "fake".to_owned(),
        machine: Machine {
            vcpus: 1,
            memory_mib: 64,
            cmdline: String::new(),
            network: false,
        },
        image: Image {
            name: "image".to_owned(),
            digest: "digest".to_owned(),
            kernel: "kernel".into(),
            initramfs: "initramfs".into(),
            rootfs: "rootfs".into(),
        },
        memory,
        lineage: Lineage::default(),
        compatibility: [("cpu".to_owned(), "model".to_owned())].into(),
        warm: None,
        labels: [].into(),
    }
}

/// Writes pages at their place in a sparse file of memory's size.
fn write_pages(path: &Path, pages: &[(u64, u8)]) {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).open(path).unwrap();
    file.set_len(MEMORY_BYTES).unwrap();
    for (page, byte) in pages {
        file.write_all_at(&[*byte; PAGE], page * PAGE_SIZE).unwrap();
    }
}

fn write_full(draft: &Draft, pages: &[(u64, u8)]) {
    write_pages(&draft.memory_path(), pages);
    fs::write(draft.state_path(), b"state").unwrap();
}

/// `None` is a page that became zero.
fn write_layer(draft: &Draft, pages: &[(u64, Option<u8>)]) {
    let data = pages
        .iter()
        .filter_map(|(page, byte)| Some((*page, (*byte)?)));
    write_pages(&draft.memory_path(), &data.collect::<Vec<_>>());
    let mut builder = Builder::new(MEMORY_BYTES).unwrap();
    for (page, byte) in pages {
        let kind = if byte.is_some() {
            Kind::Data
        } else {
            Kind::Zero
        };
        builder.push(page * PAGE_SIZE, PAGE_SIZE, kind).unwrap();
    }
    fs::write(draft.index_path(), builder.finish().encode()).unwrap();
    fs::write(draft.state_path(), b"state").unwrap();
}

impl World {
    fn full(&self, name: &str, pages: &[(u64, u8)]) -> Snapshot {
        let draft = self.store.begin(&tag(name)).unwrap();
        write_full(&draft, pages);
        draft.publish(about(MemoryDraft::Full)).unwrap()
    }

    fn layer(&self, name: &str, over: &Snapshot, pages: &[(u64, Option<u8>)]) -> Snapshot {
        self.try_layer(name, over, pages).unwrap()
    }

    fn try_layer(
        &self,
        name: &str,
        over: &Snapshot,
        pages: &[(u64, Option<u8>)],
    ) -> Result<Snapshot, Error> {
        let draft = self.store.begin(&tag(name)).unwrap();
        write_layer(&draft, pages);
        let over = over.manifest.reference();
        draft.publish(about(MemoryDraft::Layer { over }))
    }

    /// What is in the directory, the lock aside.
    fn left(&self) -> Vec<String> {
        let mut names = self.store.names().unwrap();
        names.retain(|name| name != ".lock");
        names.sort();
        names
    }

    fn tags(&self, status: Status) -> Vec<String> {
        let listed = self.store.list().unwrap().into_iter();
        let listed = listed.filter(|line| line.status == status);
        listed.map(|line| line.tag.to_string()).collect()
    }
}

#[test]
fn a_snapshot_lives() {
    let world = world();
    let draft = world.store.begin(&tag("warm")).unwrap();
    assert_eq!(world.tags(Status::Writing), ["warm"]);
    let missing = world.store.get(&tag("warm")).unwrap_err();
    assert!(matches!(missing, Error::InProgress { .. }));
    write_full(&draft, &[(3, 7)]);
    fs::write(draft.memory_path().with_file_name("junk"), b"x").unwrap();
    let id = draft.id().clone();
    let published = draft.publish(about(MemoryDraft::Full)).unwrap();
    assert_eq!(published.manifest.id, id);
    assert_eq!(world.store.get(&tag("warm")).unwrap(), published);
    assert_eq!(world.tags(Status::Ready), ["warm"]);
    assert!(!published.dir.join("junk").exists());
    let files = world.store.files(&tag("warm")).unwrap();
    assert_eq!(files.memory, published.dir.join("memory.bin"));
    assert_eq!(world.store.verify(&tag("warm")).unwrap(), MEMORY_BYTES + 5);
    let usage = published.usage();
    assert!(usage.logical_bytes > MEMORY_BYTES && usage.physical_bytes < 10 * PAGE_SIZE);
    assert_eq!(
        world.store.usage().unwrap().logical_bytes,
        usage.logical_bytes
    );
    let removed = world
        .store
        .remove(&tag("warm"), Dependents::Refuse)
        .unwrap();
    assert_eq!(removed.tags, [tag("warm")]);
    assert_eq!(world.left(), [""; 0]);
}

#[test]
fn a_tag_is_taken_once() {
    let world = world();
    let draft = world.store.begin(&tag("a")).unwrap();
    let second = world.store.begin(&tag("a")).unwrap_err();
    assert!(matches!(second, Error::InProgress { .. }));
    draft.discard().unwrap();
    world.full("a", &[]);
    let third = world.store.begin(&tag("a")).unwrap_err();
    assert!(third.to_string().contains("`forkd rmi a`"), "{third}");
    assert_eq!(world.left(), ["a"]);
}

#[test]
fn unknown_tags_are_said_to_be_unknown() {
    let world = world();
    let unknown = tag("nope");
    assert!(matches!(
        world.store.get(&unknown),
        Err(Error::NotFound { .. })
    ));
    assert!(matches!(
        world.store.pin(&unknown),
        Err(Error::NotFound { .. })
    ));
    let removed = world.store.remove(&unknown, Dependents::Cascade);
    assert!(matches!(removed, Err(Error::NotFound { .. })));
}

#[test]
fn drafts_leave_nothing_when_dropped_or_refused() {
    let world = world();
    drop(world.store.begin(&tag("a")).unwrap());
    let draft = world.store.begin(&tag("a")).unwrap();
    write_pages(&draft.memory_path(), &[(0, 1)]);
    let refused = draft.publish(about(MemoryDraft::Full)).unwrap_err();
    assert!(matches!(
        refused,
        Error::Unpublishable { damage: Damage::Missing { path }, .. } if path.ends_with("state.bin")
    ));
    assert_eq!(world.left(), [""; 0]);
}

#[test]
fn layers_are_listed_base_first_and_depth_is_bounded() {
    let world = world();
    let mut last = world.full("s0", &[]);
    for depth in 1..lineage::DEPTH_MAX {
        last = world.layer(&format!("s{depth}"), &last, &[(1, Some(depth as u8))]);
    }
    let files = world.store.files(&last.manifest.tag).unwrap();
    assert_eq!(files.layers.len(), lineage::DEPTH_MAX - 1);
    assert!(files.layers[0].memory.ends_with("s1/memory.bin"));
    assert!(files.state.ends_with("s63/state.bin"));
    let refused = world.try_layer("s64", &last, &[]).unwrap_err();
    assert!(matches!(
        refused,
        Error::Unpublishable {
            damage: Damage::Lineage { .. },
            ..
        }
    ));
}

#[test]
fn a_base_is_kept_as_its_remover_says() {
    let world = world();
    let base = world.full("base", &[(0, 1)]);
    let middle = world.layer("middle", &base, &[(1, Some(2))]);
    world.layer("top", &middle, &[(2, None)]);
    let refused = world
        .store
        .remove(&tag("base"), Dependents::Refuse)
        .unwrap_err();
    assert!(
        refused.to_string().contains("base of top, middle;"),
        "{refused}"
    );
    let detached = world
        .store
        .remove(&tag("base"), Dependents::Detach)
        .unwrap();
    assert!(detached.kept);
    assert_eq!(world.tags(Status::Ready), ["middle", "top"]);
    world.full("base", &[(0, 9)]);
    world.store.verify(&tag("top")).unwrap();
    let removed = world
        .store
        .remove(&tag("middle"), Dependents::Cascade)
        .unwrap();
    assert_eq!(removed.tags, [tag("top"), tag("middle")]);
    assert_eq!(world.left(), ["base"]);
}

#[test]
fn what_is_pinned_stays_with_all_it_lies_over() {
    let world = world();
    let base = world.full("base", &[]);
    world.layer("top", &base, &[]);
    let pin = world.store.pin(&tag("top")).unwrap();
    for (name, dependents) in [
        ("top", Dependents::Refuse),
        ("base", Dependents::Cascade),
        ("base", Dependents::Detach),
    ] {
        let refused = world.store.remove(&tag(name), dependents).unwrap_err();
        assert!(matches!(refused, Error::InUse { .. }), "{refused}");
    }
    assert_eq!(world.tags(Status::Ready), ["base", "top"]);
    assert!(pin.files().memory.exists());
    drop(pin);
    world
        .store
        .remove(&tag("base"), Dependents::Cascade)
        .unwrap();
    assert_eq!(world.left(), [""; 0]);
}

#[test]
fn flattening_gives_the_same_content_and_needs_no_base() {
    let world = world();
    let base = world.full("base", &[(0, 1), (1, 1), (2, 1), (9, 1)]);
    let middle = world.layer("middle", &base, &[(1, Some(2)), (2, None)]);
    world.layer("top", &middle, &[(2, Some(3)), (9, None)]);
    let flat = world.store.flatten(&tag("top"), &tag("flat")).unwrap();
    world
        .store
        .remove(&tag("base"), Dependents::Cascade)
        .unwrap();
    world.store.verify(&tag("flat")).unwrap();
    let mut expected = vec![0; MEMORY_BYTES as usize];
    for (page, byte) in [(0, 1), (1, 2), (2, 3)] {
        expected[page * PAGE..][..PAGE].fill(byte);
    }
    let content = fs::read(world.store.files(&flat.manifest.tag).unwrap().memory).unwrap();
    assert!(content == expected);
    assert_eq!(flat.manifest.compatibility["cpu"], "model");
}

#[test]
fn a_parent_that_went_away_stops_the_publication() {
    let world = world();
    let base = world.full("base", &[]);
    let draft = world.store.begin(&tag("top")).unwrap();
    write_layer(&draft, &[]);
    world
        .store
        .remove(&tag("base"), Dependents::Refuse)
        .unwrap();
    let over = base.manifest.reference();
    let refused = draft
        .publish(about(MemoryDraft::Layer { over }))
        .unwrap_err();
    assert!(matches!(
        refused,
        Error::Unpublishable {
            damage: Damage::BaseMissing { .. },
            ..
        }
    ));
    assert_eq!(world.left(), [""; 0]);
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        let command = std::process::Command::new(args[0])
            .args(&args[1..])
            .arg(dir.path())
            .output();
        command.is_ok_and(|output| output.status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs"]) {
        println!("skipped: mounting a small file system needs privileges");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let store = Store::open(dir.path().join("snapshots")).unwrap();
        let too_much = store.require_free(1 << 20).unwrap_err();
        let draft = store.begin(&tag("a")).unwrap();
        write_full(&draft, &[(0, 1), (1, 2)]);
        let base = draft.publish(about(MemoryDraft::Full)).unwrap();
        // Ends with an error, and with not a page left.
        let _full = fs::write(dir.path().join("ballast"), vec![1; 1 << 20]);
        let full = store.flatten(&base.manifest.tag, &tag("b")).unwrap_err();
        (too_much.to_string(), full, store.names().unwrap())
    });
    assert!(mount(&["umount"]));
    let (too_much, full, names) = result.unwrap();
    assert!(
        too_much.contains("0 MiB free, 1 MiB are needed"),
        "{too_much}"
    );
    assert!(matches!(full, Error::NoSpace { .. }), "{full:?}");
    assert!(
        !names
            .iter()
            .any(|name| name.contains('b') && name != ".lock"),
        "{names:?}"
    );
}

#[test]
fn opening_creates_and_tolerates_strangers() {
    let world = world();
    fs::create_dir(world.store.root().join("lost+found")).unwrap();
    fs::write(world.store.root().join(".other-file"), b"x").unwrap();
    let again = Store::open(world.store.root()).unwrap();
    assert_eq!(again.list().unwrap().len(), 0);
    fs::write(world.dir.path().join("file"), b"x").unwrap();
    let refused = Store::open(world.dir.path().join("file")).unwrap_err();
    assert!(matches!(refused, Error::File { .. }));
}
