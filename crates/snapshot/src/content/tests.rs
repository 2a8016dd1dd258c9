//! The hash is of content: holes do not show, every byte and the size do.

use std::os::unix::fs::FileExt;

use super::*;

const PAGE: u64 = sparse::PAGE_SIZE;

fn file(size: u64, writes: &[(u64, &[u8])]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in writes {
        file.write_all_at(bytes, *offset).unwrap();
    }
    file
}

fn hash(file: &File) -> String {
    content_hash(file).unwrap()
}

#[test]
fn the_definition_does_not_drift() {
    let file = file(3 * PAGE + 2, &[(PAGE, b"a"), (3 * PAGE, b"bc")]);
    let mut page = [0; PAGE as usize];
    page[0] = b'a';
    let mut expected = blake3::Hasher::new_derive_key("forkd snapshot file content v1");
    expected.update(&page);
    for number in [PAGE, PAGE] {
        expected.update(&number.to_le_bytes());
    }
    expected.update(b"bc");
    for number in [3 * PAGE, 2, 3 * PAGE + 2] {
        expected.update(&number.to_le_bytes());
    }
    assert_eq!(hash(&file), expected.finalize().to_hex().as_str());
    assert_eq!(
        hash(&self::file(0, &[])),
        "8f6bc7af666e2f70747344230fc4a2be8e8df5660f5ed7c9376c08b1c28b6866"
    );
}

#[test]
fn holes_and_written_zeros_are_the_same() {
    let zeros = vec![0; 10 * PAGE as usize];
    let sparse = file(10 * PAGE, &[(5 * PAGE, b"x")]);
    let full = file(10 * PAGE, &[(0, &zeros), (5 * PAGE, b"x")]);
    assert_eq!(hash(&sparse), hash(&full));
}

#[test]
fn runs_longer_than_a_read_are_one_run() {
    let bytes = vec![3; 300 * PAGE as usize];
    let whole = file(400 * PAGE, &[(7 * PAGE, &bytes)]);
    let mut expected = blake3::Hasher::new_derive_key(CONTEXT);
    expected.update(&bytes);
    for number in [7 * PAGE, 300 * PAGE, 400 * PAGE] {
        expected.update(&number.to_le_bytes());
    }
    assert_eq!(hash(&whole), expected.finalize().to_hex().as_str());
}

#[test]
fn a_byte_a_place_and_the_size_all_count() {
    let hashes: std::collections::BTreeSet<String> = [
        file(0, &[]),
        file(PAGE, &[]),
        file(2 * PAGE, &[]),
        file(2 * PAGE, &[(0, b"x")]),
        file(2 * PAGE, &[(1, b"x")]),
        file(2 * PAGE, &[(PAGE, b"x")]),
        file(3 * PAGE, &[(PAGE, b"x")]),
    ]
    .iter()
    .map(hash)
    .collect();
    assert_eq!(hashes.len(), 7);
}
