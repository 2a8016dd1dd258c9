//! Each way a snapshot can be spoiled on disk: found when it is opened, or by `verify`, and named.

use std::error::Error as _;

use super::*;

/// The error's whole chain, as a user reads it.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(source) = at {
        text.push_str(": ");
        text.push_str(&source.to_string());
        at = source.source();
    }
    text
}

/// Spoils one file of `top`, which lies over `base`, and says what opening `top` answers.
fn spoil(name: &str, how: impl FnOnce(&Path)) -> (World, String) {
    let world = world();
    let base = world.full("base", &[(0, 1), (5, 5)]);
    world.layer("top", &base, &[(1, Some(2))]);
    how(&world.store.root().join(name));
    let opened = world.store.files(&tag("top"));
    let text = opened.map_or_else(|error| chain(&error), |_| String::new());
    (world, text)
}

type Spoiler = Box<dyn FnOnce(&Path)>;

fn set_len(len: u64) -> Spoiler {
    Box::new(move |path| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(len).unwrap();
    })
}

fn replace(from: &'static str, to: &'static str) -> Spoiler {
    Box::new(move |path| {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from));
        fs::write(path, text.replacen(from, to, 1)).unwrap();
    })
}

fn flip(at: u64) -> Spoiler {
    Box::new(move |path| {
        let file = OpenOptions::new()
            .write(true)
            .read(true)
            .open(path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    })
}

fn remove() -> Spoiler {
    Box::new(|path| fs::remove_file(path).unwrap())
}

fn remove_dir() -> Spoiler {
    Box::new(|path| fs::remove_dir_all(path.parent().unwrap()).unwrap())
}

fn opening(name: &str, how: Spoiler, expected: &str) {
    let (world, text) = spoil(name, how);
    assert!(text.contains(expected), "{name}: {text}");
    assert!(text.starts_with("snapshot top is unusable; remove it with `forkd rmi top`"));
    assert!(
        world.tags(Status::Failed).contains(&"top".to_owned()),
        "{name}"
    );
    world.store.remove(&tag("top"), Dependents::Refuse).unwrap();
    let removed = world.store.remove(&tag("base"), Dependents::Refuse);
    assert!(matches!(removed, Ok(_) | Err(Error::NotFound { .. })));
    assert_eq!(world.left(), [""; 0], "{name}");
}

#[test]
fn opening_names_cut_and_missing_files() {
    opening(
        "top/memory.bin",
        set_len(PAGE_SIZE),
        "memory.bin has 4096 bytes, expected 131072",
    );
    opening(
        "top/state.bin",
        set_len(4),
        "state.bin has 4 bytes, expected 5",
    );
    opening(
        "top/memory.idx",
        set_len(80),
        "memory.idx has 80 bytes, expected 88",
    );
    opening("top/state.bin", remove(), "state.bin is missing");
    opening("top/manifest.json", remove(), "manifest.json is missing");
    opening(
        "base/state.bin",
        remove(),
        "it lies over snapshot base, which is unusable: ",
    );
    opening(
        "base/memory.bin",
        set_len(0),
        "memory.bin has 0 bytes, expected 131072",
    );
    opening(
        "base/manifest.json",
        remove_dir(),
        "it lies over snapshot base with id ",
    );
}

#[test]
fn opening_names_wrong_contents() {
    let manifest = "top/manifest.json";
    opening(
        "top/memory.idx",
        flip(33),
        "memory.idx is no layer index: layer index is damaged",
    );
    opening(
        manifest,
        set_len(100),
        "manifest.json is no manifest: EOF while parsing",
    );
    opening(
        manifest,
        replace("\"schema_version\": 1", "\"schema_version\": 9"),
        "manifest.json has schema version 9, this forkd reads version 1",
    );
    opening(
        manifest,
        replace("\"top\"", "\"tip\""),
        "says tag is tip, expected top",
    );
    opening(
        manifest,
        replace("\"state.bin\"", "\"../base\""),
        "manifest.json says files is ",
    );
}

#[test]
fn a_link_is_not_followed() {
    let (_world, text) = spoil("top/state.bin", |path| {
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("../base/state.bin", path).unwrap();
    });
    assert!(text.contains("state.bin is missing"), "{text}");
}

#[test]
fn verify_finds_a_flipped_bit_that_opening_cannot() {
    for (name, at) in [
        ("top/state.bin", 2),
        ("top/memory.bin", PAGE_SIZE + 7),
        ("top/memory.bin", 20 * PAGE_SIZE),
        ("base/memory.bin", 5 * PAGE_SIZE),
    ] {
        let (world, text) = spoil(name, flip(at));
        assert_eq!(text, "", "{name}");
        let found = chain(&world.store.verify(&tag("top")).unwrap_err());
        assert!(
            found.contains("has blake3 ") && found.contains(", expected "),
            "{found}"
        );
        assert!(found.contains(name), "{found}");
    }
}

#[test]
fn a_base_that_was_made_anew_is_not_the_base() {
    let (world, _) = spoil("top/state.bin", |_| {});
    world
        .store
        .remove(&tag("base"), Dependents::Detach)
        .unwrap();
    world.full("base", &[(0, 8)]);
    world.store.verify(&tag("top")).unwrap();
    let kept = world
        .left()
        .into_iter()
        .find(|name| name.starts_with(".base-"));
    fs::remove_dir_all(world.store.root().join(kept.unwrap())).unwrap();
    let text = chain(&world.store.get(&tag("top")).unwrap_err());
    assert!(text.contains("which is gone"), "{text}");
}

#[test]
fn removing_a_damaged_base_still_knows_its_dependents() {
    let (world, _) = spoil("base/manifest.json", set_len(3));
    let refused = world
        .store
        .remove(&tag("base"), Dependents::Refuse)
        .unwrap_err();
    assert!(matches!(refused, Error::HasDependents { .. }), "{refused}");
    world
        .store
        .remove(&tag("base"), Dependents::Cascade)
        .unwrap();
    assert_eq!(world.left(), [""; 0]);
}

#[test]
fn manifests_cannot_make_a_cycle() {
    let world = world();
    let base = world.full("base", &[]);
    let top = world.layer("top", &base, &[]);
    // By hand: the base is made a layer over its own dependent.
    let mut manifest = top.manifest.clone();
    manifest.id = base.manifest.id.clone();
    manifest.tag = base.manifest.tag.clone();
    manifest.memory = crate::manifest::Memory::Layer {
        over: top.manifest.reference(),
    };
    fs::copy(top.dir.join("memory.idx"), base.dir.join("memory.idx")).unwrap();
    fs::write(base.dir.join("manifest.json"), manifest.encode().unwrap()).unwrap();
    let text = chain(&world.store.get(&tag("top")).unwrap_err());
    assert!(text.contains("the layers form a cycle"), "{text}");
    world
        .store
        .remove(&tag("top"), Dependents::Cascade)
        .unwrap();
    assert_eq!(world.left(), [""; 0]);
}

#[test]
fn bases_of_what_a_later_version_wrote_are_not_collected() {
    let (world, _) = spoil("top/state.bin", |_| {});
    world
        .store
        .remove(&tag("base"), Dependents::Detach)
        .unwrap();
    let manifest = world.store.root().join("top/manifest.json");
    replace("\"schema_version\": 1", "\"schema_version\": 2")(&manifest);
    Store::open(world.store.root()).unwrap();
    replace("\"schema_version\": 2", "\"schema_version\": 1")(&manifest);
    world.store.verify(&tag("top")).unwrap();
    world.store.remove(&tag("top"), Dependents::Refuse).unwrap();
    assert_eq!(world.left(), [""; 0]);
}
