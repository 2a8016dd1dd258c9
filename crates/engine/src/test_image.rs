//! The image that tests with real guests boot.

use std::path::PathBuf;

use crate::MachineSpec;

/// A directory that holds `kernel`, `initramfs` and `rootfs`.
const VARIABLE: &str = "FORKD_TEST_IMAGE_DIR";

/// The directory; `None`, and why on the output, where there is none.
pub(crate) fn directory() -> Option<PathBuf> {
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    if named.is_none() {
        eprintln!("skipped: {VARIABLE} names no directory with kernel, initramfs and rootfs");
    }
    named
}

/// A machine with one vCPU that boots it; `None` as above.
pub(crate) fn machine(memory_mib: u64, network: bool) -> Option<MachineSpec> {
    let dir = directory()?;
    Some(MachineSpec {
        vcpus: 1,
        memory_mib,
        kernel: dir.join("kernel"),
        initramfs: dir.join("initramfs"),
        rootfs: dir.join("rootfs"),
        cmdline: String::new(),
        network,
    })
}
