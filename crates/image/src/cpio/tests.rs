//! The bytes are those the format asks for; a second reader agrees.

use std::process::{Command, Stdio};

use super::*;

fn sample() -> Vec<u8> {
    let mut archive = Archive::new(Vec::new());
    archive.directory("dev", 0o755).unwrap();
    archive.device("dev/console", 0o600, 5, 1).unwrap();
    archive.file("init", 0o755, b"hello").unwrap();
    archive.symlink("sbin", "bin").unwrap();
    archive.finish().unwrap()
}

/// Name, mode, device number, content.
type Entry = (String, u32, (u32, u32), Vec<u8>);

/// A reader of its own, so that the writer is not checked by itself.
fn read(mut bytes: &[u8]) -> Vec<Entry> {
    let total = bytes.len();
    let mut entries = Vec::new();
    loop {
        assert_eq!(&bytes[..6], b"070701");
        let field = |i: usize| {
            let text = std::str::from_utf8(&bytes[6 + i * 8..14 + i * 8]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        let (mode, size, rdev, name_size) = (
            field(1),
            field(6) as usize,
            (field(9), field(10)),
            field(11) as usize,
        );
        let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
        assert_eq!(bytes[110 + name_size - 1], 0);
        let data = (110 + name_size).next_multiple_of(4);
        let content = bytes[data..data + size].to_vec();
        if name == "TRAILER!!!" {
            assert!(total.is_multiple_of(512));
            return entries;
        }
        entries.push((name, mode, rdev, content));
        bytes = &bytes[(data + size).next_multiple_of(4)..];
    }
}

#[test]
fn every_entry_comes_back() {
    let entries = read(&sample());
    assert_eq!(entries[0], ("dev".into(), 0o040_755, (0, 0), vec![]));
    assert_eq!(
        entries[1],
        ("dev/console".into(), 0o020_600, (5, 1), vec![])
    );
    assert_eq!(
        entries[2],
        ("init".into(), 0o100_755, (0, 0), b"hello".to_vec())
    );
    assert_eq!(
        entries[3],
        ("sbin".into(), 0o120_777, (0, 0), b"bin".to_vec())
    );
    assert_eq!(entries.len(), 4);
}

#[test]
fn the_same_entries_give_the_same_bytes() {
    assert_eq!(sample(), sample());
}

#[test]
fn paths_that_would_break_the_archive_are_refused() {
    for bad in ["", "/init", "TRAILER!!!", "a\0b"] {
        assert!(
            Archive::new(Vec::new()).file(bad, 0o644, b"").is_err(),
            "{bad:?}"
        );
    }
}

#[test]
fn the_cpio_program_agrees() {
    let Ok(mut child) = Command::new("cpio")
        .args(["-t", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    else {
        println!("skipped: no cpio on PATH (apt-get install cpio)");
        return;
    };
    child.stdin.take().unwrap().write_all(&sample()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "dev\ndev/console\ninit\nsbin\n"
    );
}
