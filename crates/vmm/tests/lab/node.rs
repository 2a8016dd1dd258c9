//! The node itself.

use std::path::PathBuf;

/// The lab's inputs, or nothing when this is not the lab.
pub(crate) fn lab() -> Option<PathBuf> {
    let found = std::env::var_os("FORKD_LAB").map(PathBuf::from);
    if found.is_none() {
        eprintln!("skipped: not in the lab (run `cargo xtask lab`)");
    }
    found
}

#[test]
fn has_true_virtualisation() {
    let Some(_) = lab() else { return };
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(info.contains(" svm"), "the node's cpu has no svm");
    assert!(
        std::fs::metadata("/dev/kvm").is_ok(),
        "the node has no /dev/kvm"
    );
}
