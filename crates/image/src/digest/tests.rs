//! Digests change when, and only when, they should.

use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn sample() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("bin")).unwrap();
    fs::write(dir.path().join("bin/sh"), "one").unwrap();
    symlink("sh", dir.path().join("bin/bash")).unwrap();
    dir
}

#[test]
fn json_is_kept_apart_by_purpose() {
    let a = Digest::of_json("kernel", &("x", 1));
    assert_eq!(a, Digest::of_json("kernel", &("x", 1)));
    assert_ne!(a, Digest::of_json("rootfs", &("x", 1)));
    assert_ne!(a, Digest::of_json("kernel", &("x", 2)));
    assert_eq!(a.as_str().len(), 64);
    assert_eq!(a.uuid().len(), 36);
}

#[test]
fn digests_are_parsed_strictly() {
    assert!(Digest::try_from("ab".repeat(32)).is_ok());
    for bad in ["", "ab", &"AB".repeat(32), &"../".repeat(22)[..64]] {
        assert!(Digest::try_from(bad.to_owned()).is_err(), "{bad}");
    }
}

#[test]
fn a_tree_is_the_same_until_something_changes() {
    let dir = sample();
    let first = tree(dir.path()).unwrap();
    assert_eq!(first, tree(dir.path()).unwrap());
    assert_eq!((first.entries, first.bytes), (3, 3));

    let mut seen = vec![first.digest];
    let mut changed = |what: &str| {
        let now = tree(dir.path()).unwrap().digest;
        assert!(!seen.contains(&now), "{what} went unnoticed");
        seen.push(now);
    };
    fs::write(dir.path().join("bin/sh"), "two").unwrap();
    changed("a write of the same length");
    fs::set_permissions(dir.path().join("bin/sh"), fs::Permissions::from_mode(0o755)).unwrap();
    changed("a mode");
    fs::create_dir(dir.path().join("empty")).unwrap();
    changed("an empty directory");
    fs::remove_file(dir.path().join("bin/bash")).unwrap();
    changed("a removal");
}

#[test]
fn a_missing_tree_is_named() {
    let error = tree(Path::new("/no/such/dir")).unwrap_err();
    assert!(error.to_string().contains("/no/such/dir"), "{error}");
}
