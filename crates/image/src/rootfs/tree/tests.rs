//! Nothing gets out of the tree.

use std::os::unix::fs::symlink;

use super::*;

struct World {
    dir: tempfile::TempDir,
    tree: Tree,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("root")).unwrap();
    std::fs::create_dir(dir.path().join("outside")).unwrap();
    std::fs::write(dir.path().join("outside/secret"), "secret").unwrap();
    let tree = Tree::open(&dir.path().join("root")).unwrap();
    World { dir, tree }
}

#[test]
fn paths_are_taken_apart_strictly() {
    for (given, clean) in [
        ("a/b", "a/b"),
        ("./a//b/", "a/b"),
        ("", ""),
        ("./", ""),
        ("a/./b", "a/b"),
    ] {
        assert_eq!(
            relative(given.as_bytes()).unwrap(),
            Path::new(clean),
            "{given}"
        );
    }
    for bad in [
        &b"/etc"[..],
        b"..",
        b"a/../b",
        b"../a",
        b"a/..",
        b"a\0b",
        &[b'x'; 5000],
    ] {
        assert!(relative(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn links_are_resolved_inside_the_tree() {
    let World { dir, tree } = world();
    let root = dir.path().join("root");
    symlink(dir.path().join("outside"), root.join("absolute")).unwrap();
    symlink("../outside", root.join("upwards")).unwrap();
    symlink("/real", root.join("inside")).unwrap();
    std::fs::create_dir(root.join("real")).unwrap();

    tree.write(Path::new("inside/file"), b"x", 0o644).unwrap();
    assert_eq!(std::fs::read(root.join("real/file")).unwrap(), b"x");
    // A link to nothing within the tree is a failure, not a new directory somewhere.
    assert!(tree.write(Path::new("absolute/evil"), b"x", 0o644).is_err());
    assert!(tree.write(Path::new("upwards/evil"), b"x", 0o644).is_err());
    let outside: Vec<_> = std::fs::read_dir(dir.path().join("outside"))
        .unwrap()
        .collect();
    assert_eq!(outside.len(), 1);
}

#[test]
fn the_last_component_is_replaced_not_followed() {
    let World { dir, tree } = world();
    let root = dir.path().join("root");
    symlink(dir.path().join("outside/secret"), root.join("file")).unwrap();
    symlink(dir.path().join("outside"), root.join("dir")).unwrap();
    tree.write(Path::new("file"), b"mine", 0o600).unwrap();
    let place = tree.place(Path::new("dir")).unwrap();
    tree.directory(
        &place,
        &Attributes {
            mode: 0o755,
            ..Attributes::default()
        },
    )
    .unwrap();
    tree.remove(Path::new("dir")).unwrap();
    let secret = std::fs::read_to_string(dir.path().join("outside/secret")).unwrap();
    assert_eq!(secret, "secret");
    assert_eq!(std::fs::read(root.join("file")).unwrap(), b"mine");
}

#[test]
fn hard_links_stay_inside() {
    let World { dir, tree } = world();
    let root = dir.path().join("root");
    symlink(dir.path().join("outside"), root.join("out")).unwrap();
    tree.write(Path::new("a"), b"a", 0o644).unwrap();
    let place = |path: &str| tree.place(Path::new(path)).unwrap();
    tree.hard_link(&place("b"), &place("a")).unwrap();
    assert_eq!(std::fs::read(root.join("b")).unwrap(), b"a");
    assert!(tree.place(Path::new("out/secret")).is_err());
    assert!(tree.hard_link(&place("b"), &place("missing")).is_err());
    assert_eq!(
        std::fs::read(root.join("b")).unwrap(),
        b"a",
        "what was there is kept"
    );
    tree.hard_link(&place("a"), &place("a")).unwrap();
    assert!(root.join("a").exists());
}

#[test]
fn modes_times_and_removal() {
    use std::os::unix::fs::MetadataExt;
    let World { dir, tree } = world();
    let attributes = Attributes {
        mode: 0o4755,
        mtime: 1234,
        ..Attributes::default()
    };
    let place = tree.place(Path::new("d/e/su")).unwrap();
    tree.file(&place, &mut &b"x"[..], &attributes).unwrap();
    let metadata = std::fs::metadata(dir.path().join("root/d/e/su")).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.mtime()), (0o4755, 1234));
    tree.date_directories(&[(PathBuf::from("d"), 99)].into())
        .unwrap();
    assert_eq!(
        std::fs::metadata(dir.path().join("root/d"))
            .unwrap()
            .mtime(),
        99
    );
    assert_eq!(
        std::fs::metadata(dir.path().join("root/d/e"))
            .unwrap()
            .mtime(),
        0
    );
    tree.remove(Path::new("d")).unwrap();
    tree.remove(Path::new("d/e/f")).unwrap();
    assert!(!dir.path().join("root/d").exists());
}
