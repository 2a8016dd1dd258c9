//! The schema, pinned: a golden manifest is read, and written again byte for byte.

use super::*;

const GOLDEN: &str = include_str!("golden-v1.json");

fn golden() -> Manifest {
    Manifest::decode(GOLDEN.as_bytes()).unwrap()
}

#[test]
fn constants_do_not_drift() {
    assert_eq!(SCHEMA_VERSION, 1);
    let names = [MANIFEST, MEMORY, INDEX, STATE];
    assert_eq!(
        names,
        ["manifest.json", "memory.bin", "memory.idx", "state.bin"]
    );
}

#[test]
fn golden_manifest_is_read_and_written_unchanged() {
    let manifest = golden();
    assert_eq!(manifest.tag.as_str(), "branch-1");
    assert_eq!(manifest.memory.over().unwrap().tag.as_str(), "warm");
    assert_eq!(manifest.lineage.sandbox.as_ref().unwrap().as_str(), "sb-7");
    assert_eq!(manifest.file("memory.bin").unwrap().size, 536_870_912);
    assert_eq!(
        String::from_utf8(manifest.encode().unwrap()).unwrap(),
        GOLDEN
    );
}

#[test]
fn fields_of_the_future_are_kept() {
    let with = GOLDEN.replacen('{', "{\n  \"sealed\": {\"by\": \"hsm\"},", 1);
    let manifest = Manifest::decode(with.as_bytes()).unwrap();
    assert_eq!(manifest.unknown["sealed"]["by"], "hsm");
    let again = Manifest::decode(&manifest.encode().unwrap()).unwrap();
    assert_eq!(again, manifest);
}

#[test]
fn optional_fields_have_defaults() {
    let minimal = r#"{"schema_version": 1, "id": "00000000000000000000000000000001", "tag": "t",
        "created_at_ms": 0, "engine": "fake", "machine": {"vcpus": 1, "memory_mib": 64},
        "image": {"name": "i", "digest": "d", "kernel": "k", "initramfs": "r", "rootfs": "f"},
        "memory": {"form": "full"}, "files": []}"#;
    let manifest = Manifest::decode(minimal.as_bytes()).unwrap();
    assert_eq!(manifest.lineage, Lineage::default());
    assert_eq!(manifest.memory, Memory::Full);
}

#[test]
fn another_version_is_named_whatever_its_shape() {
    for text in [
        "{\"schema_version\": 7}",
        "{\"schema_version\": 7, \"tag\": [1]}",
    ] {
        let refused = Manifest::decode(text.as_bytes());
        assert!(matches!(refused, Err(DecodeError::Version { found: 7 })));
    }
    for text in [
        "",
        "{}",
        "[1]",
        "{\"schema_version\": 1}",
        "{\"schema_version\": -1}",
    ] {
        let refused = Manifest::decode(text.as_bytes());
        assert!(matches!(refused, Err(DecodeError::Syntax(_))), "{text}");
    }
    let bad_id = GOLDEN.replace("0123456789abcdef0123456789abcdef", "../../etc");
    assert!(Manifest::decode(bad_id.as_bytes()).is_err());
}
