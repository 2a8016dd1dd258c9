//! The firecracker engine: pure parts always, its program with a guest of a few instructions where it is at hand, and
//! the contract with stock Linux where the CPU can run it.

mod api;
mod linux;
mod machine;

use std::path::Path;

use super::*;

/// Whether Firecracker can be started here; says why not on the output.
fn startable() -> bool {
    if let Err(error) = facts::ask(Path::new(PROGRAM)) {
        eprintln!("skipped: no firecracker on PATH ({error})");
        return false;
    }
    let kvm = Facts::collect().kvm;
    if !kvm.is_usable() {
        eprintln!("skipped: /dev/kvm cannot be opened ({kvm:?})");
    }
    kvm.is_usable()
}

#[test]
fn versions_that_cannot_be_used_are_refused_with_the_version() {
    let judge = |text: &str| facts::judge(Path::new("fc"), Version::after("Firecracker v", text));
    for good in ["1.10.0", "1.13.1", "1.15.0", "1.17.0-dev", "2.0.0"] {
        let found = judge(&format!("Firecracker v{good}\n\n")).unwrap();
        assert!(good.starts_with(&found.to_string()), "{good}");
        assert!(objection(Path::new("fc"), Some(good)).is_none());
    }
    for (bad, word) in [
        ("Firecracker v1.9.1\n", "1.9.1 is too old"),
        ("Firecracker v1.16.1\n", "1.16.1 loses"),
        ("QEMU emulator", "says no version"),
    ] {
        let error = judge(bad).unwrap_err().to_string();
        assert!(
            error.contains(word) && error.contains("1.10 or later"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn an_absent_or_strange_program_is_named_with_the_remedy() {
    let absent = Firecracker::new("firecracker-that-is-not-there");
    let error = absent.compatibility().await.unwrap_err().to_string();
    assert!(
        error.contains("not installed") && error.contains("PATH"),
        "{error}"
    );
    let strange = Firecracker::new("true");
    let error = strange.compatibility().await.unwrap_err().to_string();
    assert!(error.contains("no version"), "{error}");
}

#[test]
fn differences_are_named() {
    let facts = |format: &str, cpu: &str| {
        BTreeMap::from([
            ("firecracker_version".to_owned(), "1.13.0".to_owned()),
            ("firecracker_snapshot_format".to_owned(), format.to_owned()),
            ("cpu_model".to_owned(), cpu.to_owned()),
        ])
    };
    let here = facts("7.1.0", "A");
    for (format, cpu, expected) in [
        ("7.1.0", "A", None),
        ("7.0.3", "A", None),
        ("7.2.0", "A", Some("reads format 7.1.0")),
        ("6.0.0", "A", Some("wrote it in format 6.0.0")),
        ("7.1.0", "B", Some("cpu model was B")),
        ("", "A", Some("format")),
    ] {
        let found = facts::difference(&facts(format, cpu), &here);
        match expected {
            None => assert_eq!(found, None),
            Some(words) => assert!(found.as_ref().unwrap().contains(words), "{found:?}"),
        }
    }
    assert!(
        facts::difference(&BTreeMap::new(), &here)
            .unwrap()
            .contains("unknown")
    );
}

#[test]
fn records_of_written_pages_are_asked_for_in_the_words_of_the_version() {
    let tracking = |version| {
        let format = Version::new(1, 0, 0);
        About { version, format }.tracking()
    };
    let old = Request::Load(tracking(Version::new(1, 12, 3)))
        .encode()
        .2
        .unwrap();
    let new = Request::Load(tracking(Version::new(1, 13, 0)))
        .encode()
        .2
        .unwrap();
    assert!(old["enable_diff_snapshots"] == true && old.get("track_dirty_pages").is_none());
    assert!(new["track_dirty_pages"] == true && new.get("enable_diff_snapshots").is_none());
}

#[test]
fn names_are_what_firecracker_takes_and_paths_are_the_same_for_all() {
    assert_eq!(arguments::name_argument("sb-1_a.b"), "forkd-sb-1-a-b");
    let paths = [names::API, names::VSOCK, names::DEVICES, ROOTFS, MEMORY];
    assert!(paths.iter().all(|path| Path::new(path).is_relative()));
    // Snapshots hold it, and slots must have one of this name.
    assert_eq!(network::TAP, forkd_slot::address::TAP);
}

#[test]
fn a_panic_is_read_from_the_end_of_the_console() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    let panicked = |text: &[u8]| {
        std::fs::write(&path, text).unwrap();
        process::panicked(&path).unwrap()
    };
    let panic = b"[    1.2] Kernel panic - not syncing: no init\n";
    assert!(panicked(panic));
    assert!(panicked(&[&[b'x'; 1 << 20][..], panic].concat()));
    assert!(!panicked(&[panic, &[b'x'; 1 << 20][..]].concat()));
    assert!(!panicked(b"") && process::panicked(Path::new("/no/such")).is_err());
}
