//! The root filesystem of the node: a small Debian, packed read-only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::command::{Error, run};

/// What the suite and the engines under test call by name.
const PACKAGES: &str = "iproute2,kmod,nftables,procps,python3,qemu-system-x86";
const SUITE: &str = "bookworm";

/// Builds the root, or finds it under `cache`.
pub(crate) fn prepare(cache: &Path) -> Result<PathBuf, Error> {
    let packed = cache.join("root.erofs");
    let recipe = cache.join("root.recipe");
    let wanted = format!("{SUITE} {PACKAGES}");
    if packed.is_file() && fs::read_to_string(&recipe).is_ok_and(|found| found == wanted) {
        return Ok(packed);
    }
    let tree = cache.join("root.tree");
    let fresh = cache.join("root.erofs.new");
    fs::remove_dir_all(&tree).ok();
    fs::remove_file(&fresh).ok();
    run(
        Command::new("mmdebstrap")
            .args([
                "--variant=essential",
                "--quiet",
                "--include",
                PACKAGES,
                SUITE,
            ])
            .arg(&tree),
        "install the package mmdebstrap",
    )?;
    for unneeded in [
        "usr/share/doc",
        "usr/share/locale",
        "usr/share/man",
        "var/cache/apt",
    ] {
        fs::remove_dir_all(tree.join(unneeded)).ok();
    }
    pack(&tree, &fresh, &["-zlz4"])?;
    fs::remove_dir_all(&tree).map_err(Error::file(&tree))?;
    fs::rename(&fresh, &packed).map_err(Error::file(&packed))?;
    fs::write(&recipe, wanted).map_err(Error::file(&recipe))?;
    Ok(packed)
}

/// Packs a directory into an erofs image.
pub(crate) fn pack(tree: &Path, image: &Path, options: &[&str]) -> Result<(), Error> {
    run(
        Command::new("mkfs.erofs")
            .args(["-T0", "--quiet"])
            .args(options)
            .arg(image)
            .arg(tree),
        "install the package erofs-utils",
    )?;
    Ok(())
}
