//! Debian's cloud kernel and its modules, taken from the package and never installed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::command::{Error, run};

const META_PACKAGE: &str = "linux-image-cloud-amd64";
const APT: &str = "run `apt-get update` and see that the Debian mirror answers";

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The compressed kernel, `vmlinuz-VERSION`.
    pub(crate) image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// Downloads and unpacks the kernel package, or finds it under `cache`.
    pub(crate) fn prepare(cache: &Path) -> Result<Self, Error> {
        let package = resolve()?;
        let root = unpack(cache, &package)?;
        let version = package.trim_start_matches("linux-image-");
        Ok(Self {
            image: root.join(format!("boot/vmlinuz-{version}")),
            modules: root.join(format!("lib/modules/{version}/kernel")),
        })
    }

    /// The files of `wanted` modules, each after the modules it needs.
    /// A name the kernel does not have as a module is built in and left out.
    pub(crate) fn modules(&self, wanted: &[&str]) -> Result<Vec<PathBuf>, Error> {
        let mut all = Vec::new();
        list(&self.modules, &mut all)?;
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            visit(name, &all, &mut seen, &mut order)?;
        }
        Ok(order)
    }
}

/// Downloads one Debian package and unpacks it under `cache`, once.
pub(crate) fn unpack(cache: &Path, package: &str) -> Result<PathBuf, Error> {
    let root = cache.join(package);
    if root.is_dir() {
        return Ok(root);
    }
    let download = cache.join(format!("{package}.download"));
    fs::remove_dir_all(&download).ok();
    fs::create_dir_all(download.join("root")).map_err(Error::file(&download))?;
    run(
        Command::new("apt-get")
            .args(["-qq", "download", package])
            .current_dir(&download),
        APT,
    )?;
    let deb = fs::read_dir(&download)
        .map_err(Error::file(&download))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .unwrap_or_else(|| download.join(format!("{package}.deb")));
    run(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(&deb)
            .arg(download.join("root")),
        "install the package dpkg",
    )?;
    fs::rename(download.join("root"), &root).map_err(Error::file(&root))?;
    fs::remove_dir_all(&download).map_err(Error::file(&download))?;
    Ok(root)
}

/// The package the meta package stands for today.
fn resolve() -> Result<String, Error> {
    let listing = run(
        Command::new("apt-cache").args(["depends", META_PACKAGE]),
        APT,
    )?;
    let listing = String::from_utf8_lossy(&listing);
    let package = listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"));
    Ok(package.unwrap_or(META_PACKAGE).to_owned())
}

fn list(directory: &Path, into: &mut Vec<PathBuf>) -> Result<(), Error> {
    for entry in fs::read_dir(directory).map_err(Error::file(directory))? {
        let path = entry.map_err(Error::file(directory))?.path();
        if path.is_dir() {
            list(&path, into)?;
        } else {
            into.push(path);
        }
    }
    Ok(())
}

fn visit(
    name: &str,
    all: &[PathBuf],
    seen: &mut BTreeSet<String>,
    order: &mut Vec<PathBuf>,
) -> Result<(), Error> {
    let name = name.replace('-', "_");
    if !seen.insert(name.clone()) {
        return Ok(());
    }
    let found = all.iter().find(|path| {
        path.file_name()
            .and_then(|file| file.to_str())
            .and_then(|file| file.strip_suffix(".ko"))
            .is_some_and(|stem| stem.replace('-', "_") == name)
    });
    let Some(path) = found else { return Ok(()) };
    for needed in dependencies(path)? {
        visit(&needed, all, seen, order)?;
    }
    order.push(path.clone());
    Ok(())
}

/// Reads the `depends=` note a module carries in its `.modinfo` section.
fn dependencies(module: &Path) -> Result<Vec<String>, Error> {
    const NOTE: &[u8] = b"\0depends=";
    let bytes = fs::read(module).map_err(Error::file(module))?;
    let Some(at) = bytes.windows(NOTE.len()).position(|window| window == NOTE) else {
        return Ok(Vec::new());
    };
    let value = &bytes[at + NOTE.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    let value = String::from_utf8_lossy(&value[..end]);
    Ok(value
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}
