//! Blobs: directories named by their content, and the cache that leads from inputs to blobs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{io_error, sweep};
use crate::Error;
use crate::digest::Digest;

pub(super) const VMLINUZ: &str = "vmlinuz";
pub(super) const VMLINUX: &str = "vmlinux";
pub(super) const INITRAMFS: &str = "initramfs.cpio";
pub(super) const ROOTFS: &str = "rootfs.erofs";
const MANIFEST: &str = "blob.json";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Kernel,
    Initramfs,
    Rootfs,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::Kernel => "kernel",
            Kind::Initramfs => "initramfs",
            Kind::Rootfs => "rootfs",
        }
    }
}

/// What a blob holds. Its JSON's digest names the blob.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Manifest {
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    size_bytes: u64,
    blake3: Digest,
}

/// A blob, and what its maker noted about it that is not its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cached {
    pub(super) blob: Digest,
    #[serde(default)]
    pub(super) notes: BTreeMap<String, String>,
}

pub(super) fn name(kind: Kind, digest: &Digest) -> String {
    format!("{}-{digest}", kind.as_str())
}

pub(super) fn path(store: &Path, name: &str) -> PathBuf {
    store.join("blobs").join(name)
}

fn input_path(store: &Path, kind: Kind, inputs: &Digest) -> PathBuf {
    store
        .join("inputs")
        .join(format!("{}.json", name(kind, inputs)))
}

impl Manifest {
    pub(super) fn read(dir: &Path) -> Option<Manifest> {
        serde_json::from_slice(&fs::read(dir.join(MANIFEST)).ok()?).ok()
    }

    /// Whether all files are there at full length. Their bytes were checked when they were written.
    pub(super) fn complete(&self, dir: &Path) -> bool {
        !self.files.is_empty()
            && self.files.iter().all(|(file, entry)| {
                fs::symlink_metadata(dir.join(file))
                    .is_ok_and(|m| m.is_file() && m.size() == entry.size_bytes)
            })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.files.values().map(|entry| entry.size_bytes).sum()
    }

    fn of(dir: &Path) -> Result<Manifest, Error> {
        let mut manifest = Manifest::default();
        let mut pending = vec![PathBuf::new()];
        while let Some(below) = pending.pop() {
            let at = dir.join(&below);
            for entry in fs::read_dir(&at).map_err(io_error("list", &at))? {
                let entry = entry.map_err(io_error("list", &at))?;
                let (path, below) = (entry.path(), below.join(entry.file_name()));
                let metadata = entry.metadata().map_err(io_error("read", &path))?;
                if metadata.is_dir() {
                    pending.push(below);
                    continue;
                }
                let blake3 = Digest::of_file(&path).map_err(Error::Digest)?;
                let entry = Entry {
                    size_bytes: metadata.size(),
                    blake3,
                };
                manifest.files.insert(below.display().to_string(), entry);
            }
        }
        Ok(manifest)
    }
}

/// What these inputs gave before, if it is still whole.
pub(super) fn cached(store: &Path, kind: Kind, inputs: &Digest) -> Option<Cached> {
    let bytes = fs::read(input_path(store, kind, inputs)).ok()?;
    let cached: Cached = serde_json::from_slice(&bytes).ok()?;
    let dir = path(store, &name(kind, &cached.blob));
    Manifest::read(&dir)
        .filter(|manifest| manifest.complete(&dir))
        .map(|_| cached)
}

/// Names a finished directory by its content and moves it into place, durably.
pub(super) fn publish(
    store: &Path,
    kind: Kind,
    inputs: &Digest,
    made: &Path,
    notes: BTreeMap<String, String>,
) -> Result<Cached, Error> {
    let manifest = Manifest::of(made)?;
    let blob = Digest::of_json(kind.as_str(), &manifest);
    let json = serde_json::to_vec_pretty(&manifest).expect("plain fields");
    sweep::write_file(&made.join(MANIFEST), &json)?;
    let target = path(store, &name(kind, &blob));
    let there = Manifest::read(&target).is_some_and(|m| m == manifest && m.complete(&target));
    if !there {
        sweep::sync_tree(made)?;
        if target.exists() {
            // Damaged: what has it open keeps it.
            fs::remove_dir_all(&target).map_err(io_error("remove", &target))?;
        }
        fs::rename(made, &target).map_err(io_error("publish", &target))?;
        sweep::sync_dir(&store.join("blobs"))?;
    }
    let cached = Cached { blob, notes };
    let json = serde_json::to_vec_pretty(&cached).expect("plain fields");
    sweep::replace_file(&input_path(store, kind, inputs), &store.join("tmp"), &json)?;
    Ok(cached)
}

/// Removes the blobs that are not named, and the cache's entries that lead to them.
pub(super) fn drop_unused(store: &Path, used: &BTreeSet<String>) -> Result<(), Error> {
    let inputs = store.join("inputs");
    for entry in fs::read_dir(&inputs).map_err(io_error("list", &inputs))? {
        let path = entry.map_err(io_error("list", &inputs))?.path();
        let kind = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.split('-').next());
        let cached = fs::read(&path)
            .ok()
            .and_then(|b| serde_json::from_slice::<Cached>(&b).ok());
        let kept = match (kind, cached) {
            (Some(kind), Some(cached)) => used.contains(&format!("{kind}-{}", cached.blob)),
            _ => false,
        };
        if !kept {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    let blobs = store.join("blobs");
    for entry in fs::read_dir(&blobs).map_err(io_error("list", &blobs))? {
        let entry = entry.map_err(io_error("list", &blobs))?;
        if !entry
            .file_name()
            .to_str()
            .is_some_and(|name| used.contains(name))
        {
            let path = entry.path();
            fs::remove_dir_all(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}
