//! Finds the guest agent that goes into images.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

const NAME: &str = "forkd-agent";

/// Program headers are within the first pages of any program.
const HEAD: u64 = 4096;

/// The agent: `FORKD_AGENT`, or one that was installed or built with this program.
pub fn find() -> Result<PathBuf, Failure> {
    let named = std::env::var_os("FORKD_AGENT").filter(|path| !path.is_empty());
    let program = std::env::current_exe().ok();
    pick(named.map(PathBuf::from), program.as_deref())
}

fn pick(named: Option<PathBuf>, program: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        if path.is_file() {
            return Ok(path);
        }
        return Err(Failure::new(format!(
            "FORKD_AGENT names {}, which is no file",
            path.display()
        ))
        .with_help("unset it, or let it name a statically linked forkd-agent"));
    }
    let places = places(program);
    let found = places.iter().find(|path| is_static(path));
    found.cloned().ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
        Failure::new(format!(
            "no statically linked forkd-agent in {}",
            places.join(", ")
        ))
        .with_help("run `make build` (or `make install`), or name one in FORKD_AGENT")
    })
}

/// Where an agent may be, best first. A dynamically linked one beside the program is what a plain
/// `cargo build` leaves there; it cannot be a guest's first program and is passed over.
fn places(program: Option<&Path>) -> Vec<PathBuf> {
    let dir = program.and_then(Path::parent);
    let beside = dir.map(|dir| dir.join(NAME));
    let below = dir
        .and_then(Path::parent)
        .map(|up| up.join("lib/forkd").join(NAME));
    let installed = ["/usr/local/lib/forkd", "/usr/lib/forkd"].map(|dir| Path::new(dir).join(NAME));
    beside.into_iter().chain(below).chain(installed).collect()
}

fn is_static(path: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(HEAD).read_to_end(&mut head));
    read.is_ok() && head.starts_with(b"\x7fELF") && !asks_for_a_loader(&head)
}

/// Whether the ELF head names an interpreter (a program header of type 3).
fn asks_for_a_loader(head: &[u8]) -> bool {
    let u16_at = |at: usize| {
        head.get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    let offset = head
        .get(32..40)
        .and_then(|b| <[u8; 8]>::try_from(b).ok())
        .map(u64::from_le_bytes);
    let (Some(offset), Some(size), Some(count)) = (offset, u16_at(54), u16_at(56)) else {
        return true;
    };
    (0..u64::from(count)).any(|index| {
        let at = offset.saturating_add(index.saturating_mul(u64::from(size)));
        let kind = usize::try_from(at)
            .ok()
            .and_then(|at| head.get(at..at.checked_add(4)?));
        kind.is_none_or(|kind| kind == [3, 0, 0, 0])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kind: u8) -> Vec<u8> {
        let mut head = vec![0; 64 + 56];
        head[..4].copy_from_slice(b"\x7fELF");
        head[32] = 64;
        head[54] = 56;
        head[56] = 1;
        head[64] = kind;
        head
    }

    #[test]
    fn a_dynamic_agent_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        let lib = dir.path().join("lib/forkd");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::write(bin.join(NAME), elf(3)).unwrap();
        std::fs::write(lib.join(NAME), elf(1)).unwrap();
        let found = pick(None, Some(&bin.join("forkd"))).unwrap();
        assert_eq!(found, lib.join(NAME));
        std::fs::write(bin.join(NAME), elf(1)).unwrap();
        assert_eq!(
            pick(None, Some(&bin.join("forkd"))).unwrap(),
            bin.join(NAME)
        );
    }

    #[test]
    fn a_named_agent_that_is_not_there_is_told() {
        let failure = pick(Some("/nonexistent/agent".into()), None).unwrap_err();
        assert!(
            failure.message().contains("/nonexistent/agent"),
            "{failure}"
        );
        assert!(failure.help().is_some());
    }

    #[test]
    fn garbage_is_no_agent() {
        assert!(asks_for_a_loader(b"\x7fELF"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"#!/bin/sh").unwrap();
        assert!(!is_static(&path));
        assert!(!is_static(&dir.path().join("absent")));
    }
}
