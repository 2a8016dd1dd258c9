//! Makes a root file system of Debian packages, an OCI image or a directory, and packs it.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::{self, Digest};
use crate::tool::{self, MKFS_EROFS};
use crate::{Progress, name, oci, preflight};

mod debian;
pub(crate) mod tree;

pub use tree::Error as TreeError;
pub(crate) use tree::Tree;

/// Where a root file system keeps what the agent should know about it.
const DEFAULTS: &str = "etc/forkd/image.json";
/// The Debian release that images are made of unless another is named.
const SUITE: &str = "bookworm";
/// What unpacking and packing Debian's base may take; packages come on top.
const DEBIAN_BASE_ROOM: u64 = 800 * 1024 * 1024;
/// A guess for each package asked for, with what it depends on.
const DEBIAN_PACKAGE_ROOM: u64 = 100 * 1024 * 1024;

/// What a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Packages of a Debian release.
    Debian(Debian),
    /// An OCI image layout: a directory, or a tar archive of one.
    Oci(PathBuf),
    /// A directory, packed as it is.
    Directory(PathBuf),
}

/// Packages of a Debian release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debian {
    /// Package names, each optionally with `=version`.
    pub packages: Vec<String>,
    /// The release's code name.
    pub suite: String,
    /// Another archive than Debian's own.
    pub mirror: Option<String>,
}

impl Debian {
    /// Packages of the default release.
    pub fn new<S: Into<String>>(packages: impl IntoIterator<Item = S>) -> Debian {
        let packages = packages.into_iter().map(Into::into).collect();
        Debian {
            packages,
            suite: SUITE.to_owned(),
            mirror: None,
        }
    }
}

/// What the agent takes for a command that names no environment, directory or user of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// `NAME=value`.
    pub env: Vec<String>,
    /// An absolute directory.
    pub workdir: String,
    /// A user name or number, optionally `:group`.
    pub user: String,
    /// How the image's main program is called; empty if it has none.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// The main program's default arguments.
    #[serde(default)]
    pub cmd: Vec<String>,
}

/// A root file system could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name is not acceptable.
    #[error("the image is described wrongly")]
    Name(#[source] name::Error),
    /// The source is no directory.
    #[error("{path} is not a directory that can be packed: {reason}")]
    NotADirectory {
        /// What was named.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// The source cannot be read.
    #[error("cannot read the directory")]
    Walk(#[source] digest::Error),
    /// The source was written to meanwhile.
    #[error("{path} changed while it was being packed; build again when nothing writes to it")]
    Changed {
        /// The directory.
        path: PathBuf,
    },
    /// Not root.
    #[error("a Debian image can only be built by root; run forkd with sudo")]
    NotRoot,
    /// Debian's tool failed.
    #[error(
        "cannot make a root of Debian {suite} with {}; check the package names and the network",
        packages.join(", ")
    )]
    Debian {
        /// The release.
        suite: String,
        /// The packages asked for.
        packages: Vec<String>,
        /// The tool's failure.
        #[source]
        source: tool::Error,
    },
    /// The OCI image failed.
    #[error("cannot use the OCI image {path}")]
    Oci {
        /// The layout.
        path: PathBuf,
        /// Why.
        #[source]
        source: oci::Error,
    },
    /// Finishing touches failed.
    #[error("cannot finish the root file system")]
    Tree(#[source] tree::Error),
    /// Packing failed.
    #[error("cannot pack the root file system")]
    Pack(#[source] tool::Error),
    /// The disk is full.
    #[error("cannot build a root file system")]
    Room(#[source] preflight::Error),
    /// A file cannot be read or written.
    #[error("cannot write {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A source that has been looked at: what it is exactly, and its cache key.
#[derive(Debug)]
pub(crate) enum Plan {
    Debian(Debian),
    Oci {
        path: PathBuf,
        image: Box<oci::Image>,
    },
    Directory {
        path: PathBuf,
        tree: digest::Tree,
    },
}

/// What decides a root's content.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Key<'a> {
    Debian {
        debian: &'a Debian,
        base: &'a [&'a str],
    },
    Oci {
        manifest: &'a str,
    },
    Directory {
        tree: &'a Digest,
    },
}

/// Looks at a source without building anything.
pub(crate) fn plan(source: &Source, store: &Path) -> Result<Plan, Error> {
    match source {
        Source::Debian(debian) => debian::plan(debian).map(Plan::Debian),
        Source::Oci(path) => {
            let image = oci::Image::open(path).map_err(|source| Error::Oci {
                path: path.clone(),
                source,
            })?;
            Ok(Plan::Oci {
                path: path.clone(),
                image: Box::new(image),
            })
        }
        Source::Directory(path) => {
            let refused = |reason| Error::NotADirectory {
                path: path.clone(),
                reason,
            };
            let real = path
                .canonicalize()
                .map_err(|_| refused("it cannot be opened"))?;
            if !real.is_dir() {
                return Err(refused("it is a file"));
            }
            if real == Path::new("/") {
                return Err(refused("it is the root of this machine"));
            }
            if store
                .canonicalize()
                .is_ok_and(|store| store.starts_with(&real))
            {
                return Err(refused("it contains the image store itself"));
            }
            let tree = digest::tree(&real).map_err(Error::Walk)?;
            Ok(Plan::Directory { path: real, tree })
        }
    }
}

impl Plan {
    /// The digest of what goes in.
    pub(crate) fn key(&self, format: u32) -> Digest {
        let key = match self {
            Plan::Debian(debian) => Key::Debian {
                debian,
                base: debian::BASE,
            },
            Plan::Oci { image, .. } => Key::Oci {
                manifest: image.manifest_digest(),
            },
            Plan::Directory { tree, .. } => Key::Directory { tree: &tree.digest },
        };
        Digest::of_json("rootfs", &(format, key))
    }

    /// What it is, for people.
    pub(crate) fn describe(&self) -> String {
        match self {
            Plan::Debian(d) => format!("Debian {}: {}", d.suite, d.packages.join(" ")),
            Plan::Oci { path, image } => {
                format!("OCI {} ({})", path.display(), image.manifest_digest())
            }
            Plan::Directory { path, .. } => format!("directory {}", path.display()),
        }
    }

    /// A name for an image that was given none.
    pub(crate) fn default_name(&self) -> String {
        let file = |path: &Path| {
            let name = if path.is_dir() {
                path.file_name()
            } else {
                path.file_stem()
            };
            name.map(|n| n.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        name::image_from(&match self {
            Plan::Debian(d) if d.packages.is_empty() => format!("debian-{}", d.suite),
            Plan::Debian(d) => d.packages.join("-"),
            Plan::Oci { path, .. } | Plan::Directory { path, .. } => file(path),
        })
    }

    /// Refuses at once what would fail after minutes: missing tools, too little room.
    pub(crate) fn preflight(&self, dir: &Path) -> Result<(), Error> {
        MKFS_EROFS.find().map_err(Error::Pack)?;
        let need = match self {
            Plan::Debian(debian) => {
                debian::preflight(debian)?;
                DEBIAN_BASE_ROOM + DEBIAN_PACKAGE_ROOM * debian.packages.len() as u64
            }
            // Unpacked about three times the layers, then packed once more.
            Plan::Oci { image, .. } => image.layer_bytes().saturating_mul(4),
            Plan::Directory { tree, .. } => tree.bytes + tree.bytes / 8,
        };
        preflight::room(dir, need).map_err(Error::Room)
    }

    /// Makes the root (in `scratch`, unless it exists) and packs it into `out`.
    pub(crate) fn build(
        &self,
        scratch: &Path,
        out: &Path,
        key: &Digest,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let root = scratch.join("root");
        match self {
            Plan::Debian(debian) => debian::build(debian, scratch, &root, progress)?,
            Plan::Oci { path, image } => {
                let failed = |source| Error::Oci {
                    path: path.clone(),
                    source,
                };
                let budget = preflight::free_bytes(scratch).map_err(Error::Room)?;
                let defaults = image.unpack(&root, budget, progress).map_err(failed)?;
                write_defaults(&Tree::open(&root).map_err(Error::Tree)?, &defaults)?;
            }
            Plan::Directory { path, tree } => {
                if !["bin/sh", "usr/bin/sh"]
                    .iter()
                    .any(|sh| path.join(sh).exists())
                {
                    progress.message("warning: the directory has no bin/sh; commands need one");
                }
                pack(path, out, scratch, key, progress)?;
                if digest::tree(path).map_err(Error::Walk)?.digest != tree.digest {
                    return Err(Error::Changed { path: path.clone() });
                }
                return Ok(());
            }
        }
        pack(&root, out, scratch, key, progress)
    }
}

fn write_defaults(tree: &Tree, defaults: &Defaults) -> Result<(), Error> {
    let json = serde_json::to_vec_pretty(defaults).expect("plain strings");
    tree.write(Path::new(DEFAULTS), &json, 0o644)
        .map_err(Error::Tree)
}

/// Packs a directory into a read-only image.
///
/// Times of files are kept: interpreters compare them with their compiled caches, and would
/// compile everything again in every guest. All else is fixed by the content.
fn pack(
    root: &Path,
    out: &Path,
    scratch: &Path,
    key: &Digest,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    progress.message("packing the root file system");
    let mut args: Vec<OsString> = ["-zlz4hc", "--preserve-mtime", "-U"]
        .map(OsString::from)
        .into();
    args.push(key.uuid().into());
    if !rustix::process::geteuid().is_root() {
        args.push("--all-root".into());
    }
    args.extend([out.into(), root.into()]);
    MKFS_EROFS
        .run(scratch, args, progress, &mut |_, _| {})
        .map_err(Error::Pack)?;
    let failed = |source| Error::Io {
        path: out.to_owned(),
        source,
    };
    let size = std::fs::metadata(out).map_err(failed)?.size();
    // Disks are read in whole sectors of up to 4 KiB by some monitors.
    let file = std::fs::File::options()
        .write(true)
        .open(out)
        .map_err(failed)?;
    file.set_len(size.next_multiple_of(4096)).map_err(failed)
}

#[cfg(test)]
mod tests;
