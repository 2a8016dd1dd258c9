//! A world of its own for each test.

use std::path::{Path, PathBuf};

use forkd_vmm::client::{Process, SnapshotFiles};
use forkd_wire::vmm::{Reply, Request};
use tempfile::TempDir;

/// The program under test; the lab has it in a place of its own.
pub(crate) fn program() -> &'static Path {
    let lab = Path::new("/lab/bin/forkd-vmm");
    if std::env::var_os("FORKD_LAB").is_some() && lab.is_file() {
        lab
    } else {
        Path::new(env!("CARGO_BIN_EXE_forkd-vmm"))
    }
}

/// Whether KVM can be used; says so if not.
pub(crate) fn kvm() -> bool {
    match forkd_vmm::kvm::open() {
        Ok(_) => true,
        Err(error) if std::env::var_os("FORKD_TEST_KVM").is_some() => panic!("{error}"),
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

/// MiB of the guests in the tests.
pub(crate) const MIB: u32 = 64;

/// A directory and a booted test guest with 64 MiB.
pub(crate) struct World {
    pub(crate) parent: Process,
    directory: TempDir,
}

impl World {
    /// `None` where the test must be skipped.
    pub(crate) fn new() -> Option<World> {
        kvm().then(|| World {
            parent: Process::boot_test_guest(program(), MIB, &[]).unwrap(),
            directory: tempfile::tempdir().unwrap(),
        })
    }

    /// A new directory.
    pub(crate) fn directory(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    }

    /// Freezes the parent, writes the snapshot and loads it.
    pub(crate) fn template(&mut self) -> (Process, SnapshotFiles) {
        let mut branch = self.parent.branch().unwrap();
        assert_eq!(branch.base, "");
        let directory = self.directory("base");
        let (files, written) = branch.template.write(&Request::Write, &directory).unwrap();
        assert!(matches!(written, Reply::Written { .. }));
        (load("base", std::slice::from_ref(&files)), files)
    }
}

/// A template of layers on disk.
pub(crate) fn load(id: &str, layers: &[SnapshotFiles]) -> Process {
    Process::template(program(), id, layers, &[]).unwrap()
}

/// What SUM reports for pages filled with `pattern`.
pub(crate) fn filled(pattern: u32, pages: u32) -> u64 {
    u64::from(forkd_vmm::guest::sum(
        (0..pages).map(|page| pattern.wrapping_add(page)),
    ))
}

/// Retries until `check` holds or patience ends.
pub(crate) fn eventually(what: &str, check: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + forkd_vmm::client::PATIENCE;
    while !check() {
        assert!(
            std::time::Instant::now() < deadline,
            "never happened: {what}"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
