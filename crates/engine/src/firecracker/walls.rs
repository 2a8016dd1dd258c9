//! What confines Firecracker besides its user and its own filters of system calls: a root with the program, the
//! devices it needs, and names for the files of each VM.

use std::path::{Path, PathBuf};

use forkd_host::process::root::{self, Contents};

use super::PROGRAM;
use super::names::{DUMP, INITRAMFS, KERNEL, MEMORY, OWN, ROOTFS, STATE};
use crate::jail::Kind;

/// Threads: one for each vCPU, the API's and the one of devices.
pub(super) const KIND: Kind = Kind {
    title: "Firecracker",
    own_sockets: true,
    open_files: 1024,
    threads: 64,
};
const KVM_DEVICE: &str = "/dev/kvm";
/// Where the host has none, VMs with a network cannot be; others can.
const TAP_DEVICE: &str = "/dev/net/tun";

/// The program's name in the root, and what else is there.
pub(super) fn contents(program: &Path) -> Result<(PathBuf, Contents), root::Error> {
    // Whatever version its file is named for, its process is known by this name.
    let mut files = root::with_libraries(program)?;
    files.retain(|file| file != program);
    let mut devices = vec![PathBuf::from(KVM_DEVICE)];
    devices.extend(Some(PathBuf::from(TAP_DEVICE)).filter(|tap| tap.exists()));
    let contents = Contents {
        files,
        renamed: vec![(program.to_owned(), PROGRAM)],
        devices,
        file_names: vec![KERNEL, INITRAMFS, ROOTFS, MEMORY, STATE, DUMP],
        dir_names: vec![OWN],
    };
    Ok((Path::new("/").join(PROGRAM), contents))
}
