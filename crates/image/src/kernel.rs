//! Finds a kernel and its modules: Debian's cloud kernel, installed or downloaded, or files that
//! the user names.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Progress, digest, modules, name, preflight, tool};

mod apt;
mod bzimage;

pub use bzimage::{release, vmlinux};

/// Where Debian's packages put kernels and modules.
const BOOT: &str = "/boot";
const MODULES: &str = "/lib/modules";
/// How the kernel's file begins and its release ends, in Debian's cloud kernel package.
const FILE_PREFIX: &str = "vmlinuz-";
const FLAVOUR: &str = "-cloud-amd64";

/// Which kernel a guest boots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum KernelSource {
    /// Debian's cloud kernel: the installed one, else the newest that apt offers, downloaded and
    /// unpacked without installing it.
    #[default]
    Debian,
    /// Files of the user's own.
    Files {
        /// A bzImage (`vmlinuz`).
        kernel: PathBuf,
        /// Its modules, like `/lib/modules/6.1.0-13-cloud-amd64`.
        modules: PathBuf,
    },
}

/// No usable kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no apt.
    #[error(
        "no Debian kernel is installed and there is no apt to download one; name a kernel with \
         --kernel FILE --modules DIR"
    )]
    NoApt,
    /// apt does not know the package.
    #[error(
        "apt offers no package {package}; add Debian's `main` archive to apt's sources, or name \
         a kernel with --kernel FILE --modules DIR"
    )]
    NoPackage {
        /// The package.
        package: String,
    },
    /// The download or the unpacking failed.
    #[error(
        "cannot get the kernel package {package}; check the network and apt's sources, or name a \
         kernel with --kernel FILE --modules DIR"
    )]
    Download {
        /// The package.
        package: String,
        /// The tool's failure.
        #[source]
        source: tool::Error,
    },
    /// A downloaded package is not what it should be.
    #[error("the kernel package {package} holds no {what}")]
    Incomplete {
        /// The package.
        package: String,
        /// What is missing.
        what: &'static str,
    },
    /// A file is no kernel.
    #[error("{path} is no x86-64 Linux kernel image (bzImage): {reason}")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// A file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A path cannot be hashed.
    #[error("cannot hash the kernel")]
    Digest(#[source] digest::Error),
    /// The modules do not do.
    #[error("the kernel's modules cannot be used")]
    Modules(#[source] modules::Error),
    /// A package name that apt gave is not one.
    #[error("apt answered with an odd package name")]
    Name(#[source] name::Error),
    /// The disk is full.
    #[error("cannot unpack a kernel")]
    Room(#[source] preflight::Error),
}

/// What decides which kernel a request gets; its digest is the cache key.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Choice {
    /// From apt; which version is decided when it is downloaded, and kept until refreshed.
    Packaged { package: &'static str },
    /// Files on this machine.
    Present {
        kernel: PathBuf,
        modules: PathBuf,
        kernel_digest: digest::Digest,
        modules_digest: digest::Digest,
    },
}

/// A kernel at hand.
#[derive(Debug)]
pub(crate) struct Material {
    pub(crate) kernel: PathBuf,
    pub(crate) modules: PathBuf,
    /// Says where it comes from, for people.
    pub(crate) origin: String,
}

/// Decides which kernel it will be, without fetching anything.
pub(crate) fn choose(source: &KernelSource) -> Result<Choice, Error> {
    match source {
        KernelSource::Files { kernel, modules } => present(kernel.clone(), modules.clone()),
        KernelSource::Debian => match installed(Path::new(BOOT), Path::new(MODULES)) {
            Some((kernel, modules)) => present(kernel, modules),
            None => Ok(Choice::Packaged {
                package: apt::META_PACKAGE,
            }),
        },
    }
}

/// Brings the chosen kernel to hand. Downloads go to `cache` and are unpacked in `scratch`.
pub(crate) fn obtain(
    choice: &Choice,
    cache: &Path,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<Material, Error> {
    match choice {
        Choice::Packaged { .. } => apt::obtain(cache, scratch, progress),
        Choice::Present {
            kernel, modules, ..
        } => Ok(Material {
            kernel: kernel.clone(),
            modules: modules.clone(),
            origin: kernel.display().to_string(),
        }),
    }
}

fn present(kernel: PathBuf, modules: PathBuf) -> Result<Choice, Error> {
    let kernel_digest = digest::Digest::of_file(&kernel).map_err(Error::Digest)?;
    let modules_digest = digest::tree(&modules).map_err(Error::Digest)?.digest;
    Ok(Choice::Present {
        kernel,
        modules,
        kernel_digest,
        modules_digest,
    })
}

/// The newest installed cloud kernel that has its modules.
fn installed(boot: &Path, modules: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut found: Vec<(Vec<u64>, PathBuf, PathBuf)> = Vec::new();
    for entry in fs::read_dir(boot).ok()?.flatten() {
        let name = entry.file_name();
        let Some(release) = name.to_str().and_then(|n| n.strip_prefix(FILE_PREFIX)) else {
            continue;
        };
        let dir = modules.join(release);
        let readable = rustix::fs::access(entry.path(), rustix::fs::Access::READ_OK).is_ok();
        if release.ends_with(FLAVOUR) && readable && dir.join("kernel").is_dir() {
            found.push((numbers(release), entry.path(), dir));
        }
    }
    found.sort();
    found.pop().map(|(_, kernel, modules)| (kernel, modules))
}

/// The numbers in a release, so that 6.1.0-9 sorts before 6.1.0-13.
fn numbers(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|n| n.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests;
