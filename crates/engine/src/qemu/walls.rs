//! What confines QEMU besides its user: a root with the program, its libraries, its firmware and nothing else; a
//! filter of system calls.

use std::fs;
use std::path::{Path, PathBuf};

use forkd_host::process::root::{self, Contents};

use super::Accel;
use crate::jail::Kind;

/// QEMU's own part of the confinement, which it enters when it has started.
pub(super) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Threads: a few for each vCPU, and QEMU's own pool of 64.
pub(super) const KIND: Kind = Kind {
    title: "QEMU",
    own_sockets: false,
    open_files: 1024,
    threads: 256,
};
const KVM_DEVICE: &str = "/dev/kvm";
/// The firmware of the machine, in the directory of QEMU's data.
const FIRMWARE: [&str; 2] = ["bios-microvm.bin", "qboot.rom"];
/// Debian has the emulator of instructions in a file of its own.
const EMULATOR: &str = "accel-tcg-x86_64.so";

/// The program's name in the root, and what else is there.
pub(super) fn contents(program: &Path, accel: Accel) -> Result<(PathBuf, Contents), root::Error> {
    let devices = match accel {
        Accel::Kvm => vec![PathBuf::from(KVM_DEVICE)],
        Accel::Tcg => Vec::new(),
    };
    let contents = Contents {
        files: files(program)?,
        devices,
        ..Contents::default()
    };
    Ok((program.to_owned(), contents))
}

/// What QEMU reads of a host.
fn files(program: &Path) -> Result<Vec<PathBuf>, root::Error> {
    let mut files = root::with_libraries(program)?;
    let prefix = program.parent().and_then(Path::parent);
    let prefix = prefix.unwrap_or_else(|| Path::new("/usr"));
    if let Some(emulator) = emulator(prefix) {
        // Its libraries are the program's.
        files.push(emulator);
    }
    for name in FIRMWARE {
        files.push(prefix.join("share/qemu").join(name));
        files.push(Path::new("/usr/share/qemu").join(name));
    }
    // Where the loader looks first.
    files.push("/etc/ld.so.cache".into());
    files.retain(|file| file.is_file());
    Ok(files)
}

fn emulator(prefix: &Path) -> Option<PathBuf> {
    let libraries = [prefix.join("lib"), prefix.join("lib64")];
    let below = fs::read_dir(&libraries[0]).into_iter().flatten().flatten();
    let below = below.map(|entry| entry.path());
    let mut found = libraries
        .iter()
        .cloned()
        .chain(below)
        .map(|dir| dir.join("qemu").join(EMULATOR));
    found.find(|file| file.is_file())
}
