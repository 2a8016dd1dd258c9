//! The store's directory: finding snapshots, checking them, and keeping them while they are used.
//!
//! Every use begins with cheap checks: version, names, sizes, layer indexes, the chain of bases. The
//! content is hashed once, when a snapshot is written, and again only by [`Store::verify`].
//!
//! Names in the directory change only under `.lock`. A snapshot in use has a shared lock on its
//! directory, one that is being written or removed an exclusive one; the kernel ends both with their
//! process, so a crash leaves no lock behind.

use std::fs;
use std::path::{Path, PathBuf};

use forkd_host::file::{self, DirLock, LockFile};
use forkd_host::sparse;
use forkd_wire::id::Tag;

use crate::check::{check_hash, head_and_files, load};
use crate::error::{Damage, Error};
use crate::lineage;
use crate::manifest::{MANIFEST, Manifest, SnapshotRef};

/// A directory of snapshots. Cheap to clone; any number of processes may have it open.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// A published snapshot that passed the cheap checks.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Its directory.
    pub dir: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// The files of a snapshot and of all it lies over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The base image of RAM: sparse, a hole is zero.
    pub memory: PathBuf,
    /// Layers over the base, oldest first.
    pub layers: Vec<Layer>,
    /// Device and CPU state of the head.
    pub state: PathBuf,
}

/// The files of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Sparse; pages stand at their own guest offset.
    pub memory: PathBuf,
    /// Which pages the layer holds.
    pub index: PathBuf,
}

/// Keeps a snapshot, and all it lies over, from being removed while it lives.
#[derive(Debug)]
pub struct Pin {
    snapshot: Snapshot,
    files: Files,
    _locks: Vec<DirLock>,
}

impl Pin {
    /// The pinned snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Its files; the paths stay valid while the pin lives.
    pub fn files(&self) -> &Files {
        &self.files
    }
}

/// How a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// A living process writes it.
    Writing,
    /// It can be used.
    Ready,
    /// It is there and cannot be used.
    Failed,
}

/// One line of a listing.
#[derive(Debug)]
pub struct Listed {
    /// The tag.
    pub tag: Tag,
    /// How it is.
    pub status: Status,
    /// The snapshot, when ready.
    pub snapshot: Option<Snapshot>,
    /// What is wrong with it, when failed.
    pub problem: Option<Damage>,
}

/// Sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes of the files, holes included.
    pub logical_bytes: u64,
    /// Bytes that the files occupy on disk. Blocks shared between files count in each.
    pub physical_bytes: u64,
}

impl Store {
    /// Opens a store, creating its directory, and removes what dead processes left half done.
    pub fn open(root: impl Into<PathBuf>) -> Result<Store, Error> {
        let store = Store { root: root.into() };
        file::create_dir(&store.root).map_err(Error::file)?;
        store.gc()?;
        Ok(store)
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Refuses where fewer than this many bytes are free for snapshots.
    pub fn require_free(&self, bytes: u64) -> Result<(), Error> {
        file::require_free(&self.root, bytes).map_err(Error::file)
    }

    /// Finds a snapshot and checks that it and all it lies over can be used.
    pub fn get(&self, tag: &Tag) -> Result<Snapshot, Error> {
        let (snapshot, _files) = self.open_chain(tag)?;
        Ok(snapshot)
    }

    /// The files of a snapshot, its bases resolved. Pin it if they are to stay.
    pub fn files(&self, tag: &Tag) -> Result<Files, Error> {
        let (_snapshot, files) = self.open_chain(tag)?;
        Ok(files)
    }

    /// Keeps a snapshot, and all it lies over, from being removed.
    pub fn pin(&self, tag: &Tag) -> Result<Pin, Error> {
        // With the names locked, no directory is replaced between the check and the lock.
        let _names = self.lock_names()?;
        let chain = self.chain(tag)?;
        let mut locks = Vec::with_capacity(chain.len());
        for snapshot in &chain {
            let lock = DirLock::shared(&snapshot.dir).map_err(Error::file)?;
            locks.push(lock.ok_or_else(|| Error::NotFound { tag: tag.clone() })?);
        }
        let (snapshot, files) = head_and_files(chain).map_err(Error::damaged(tag))?;
        Ok(Pin {
            snapshot,
            files,
            _locks: locks,
        })
    }

    /// Every snapshot by tag, also those being written and those that cannot be used.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let mut listed = Vec::new();
        for name in self.names()? {
            let (writing, tag) = match name.strip_prefix(".draft-") {
                Some(tag) => (true, tag),
                None => (false, name.as_str()),
            };
            let Ok(tag) = Tag::new(tag) else { continue };
            if writing {
                if file::is_claimed(&self.root.join(&name)).unwrap_or(false) {
                    listed.push(Listed::writing(tag));
                }
            } else if let Some(line) = self.list_one(tag) {
                listed.push(line);
            }
        }
        listed.sort_by(|a, b| a.tag.cmp(&b.tag));
        Ok(listed)
    }

    /// `None`: it was removed meanwhile.
    fn list_one(&self, tag: Tag) -> Option<Listed> {
        match self.open_chain(&tag) {
            Ok((snapshot, _files)) => Some(Listed {
                tag,
                status: Status::Ready,
                snapshot: Some(snapshot),
                problem: None,
            }),
            Err(Error::Damaged { damage, .. }) => Some(Listed {
                tag,
                status: Status::Failed,
                snapshot: None,
                problem: Some(damage),
            }),
            Err(_) => None,
        }
    }

    /// Hashes all content of a snapshot and of what it lies over, and compares. Answers the bytes of
    /// the files checked. Takes as long as reading them.
    pub fn verify(&self, tag: &Tag) -> Result<u64, Error> {
        let pin = self.pin(tag)?;
        let chain = self.resolve(&pin.snapshot.manifest.reference());
        let mut bytes = 0;
        for snapshot in chain.map_err(Error::damaged(tag))? {
            for entry in &snapshot.manifest.files {
                let path = snapshot.dir.join(&entry.name);
                check_hash(&path, &entry.blake3).map_err(Error::damaged(tag))?;
                bytes += entry.size;
            }
        }
        Ok(bytes)
    }

    /// Sizes of everything in the store, leftovers included.
    pub fn usage(&self) -> Result<Usage, Error> {
        let mut total = Usage::default();
        for name in self.names()? {
            total.add(usage_of(&self.root.join(name)));
        }
        Ok(total)
    }

    /// Where a published snapshot of this tag is or would be.
    pub(crate) fn dir_of(&self, tag: &Tag) -> PathBuf {
        self.root.join(tag.as_str())
    }

    /// Where a snapshot that lost its tag is.
    pub(crate) fn base_dir_of(&self, reference: &SnapshotRef) -> PathBuf {
        self.root.join(format!(".base-{}", reference.id))
    }

    /// Stops other changes of names, in this process and others, for a moment.
    pub(crate) fn lock_names(&self) -> Result<LockFile, Error> {
        LockFile::wait(&self.root.join(".lock")).map_err(Error::file)
    }

    /// The names in the store's directory that are text.
    pub(crate) fn names(&self) -> Result<Vec<String>, Error> {
        let failed = |source| {
            let (step, path) = ("list", self.root.clone());
            Error::file(file::Error::Io { step, path, source })
        };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            names.extend(name.into_string());
        }
        Ok(names)
    }

    fn open_chain(&self, tag: &Tag) -> Result<(Snapshot, Files), Error> {
        head_and_files(self.chain(tag)?).map_err(Error::damaged(tag))
    }

    /// A tag's snapshot and all it lies over, base first.
    fn chain(&self, tag: &Tag) -> Result<Vec<Snapshot>, Error> {
        let dir = self.dir_of(tag);
        if dir.symlink_metadata().is_err() {
            return Err(self.absent(tag));
        }
        let head = load(&dir).and_then(|head| head.expect_tag(tag));
        let chain = head.and_then(|head| self.chain_below(head));
        chain.map_err(|damage| {
            // Removed while it was read: gone is not damaged.
            if dir.symlink_metadata().is_err() {
                return self.absent(tag);
            }
            Error::damaged(tag)(damage)
        })
    }

    pub(crate) fn absent(&self, tag: &Tag) -> Error {
        let tag = tag.clone();
        let draft = self.root.join(format!(".draft-{tag}"));
        if file::is_claimed(&draft).unwrap_or(false) {
            Error::InProgress { tag }
        } else {
            Error::NotFound { tag }
        }
    }

    /// A snapshot by reference and all it lies over, base first.
    pub(crate) fn resolve(&self, reference: &SnapshotRef) -> Result<Vec<Snapshot>, Damage> {
        let head = self.find(reference)?;
        self.chain_below(head)
    }

    fn chain_below(&self, head: Snapshot) -> Result<Vec<Snapshot>, Damage> {
        lineage::chain(head, |snapshot| match snapshot.manifest.memory.over() {
            None => Ok(None),
            Some(over) => self.find(over).map(Some),
        })
    }

    /// The snapshot with this id. The tag says where to look first: it may have lost it since.
    fn find(&self, reference: &SnapshotRef) -> Result<Snapshot, Damage> {
        let mut problem = None;
        for dir in [self.dir_of(&reference.tag), self.base_dir_of(reference)] {
            if dir.symlink_metadata().is_err() {
                continue;
            }
            match load(&dir) {
                Ok(snapshot) if snapshot.manifest.id == reference.id => return Ok(snapshot),
                Ok(_another) => {}
                Err(damage) => problem = Some(damage),
            }
        }
        let SnapshotRef { tag, id } = reference.clone();
        Err(match problem {
            Some(damage) => Damage::Base {
                tag,
                damage: Box::new(damage),
            },
            None => Damage::BaseMissing { tag, id },
        })
    }
}

impl Snapshot {
    /// Sizes of its own files.
    pub fn usage(&self) -> Usage {
        usage_of(&self.dir)
    }

    fn expect_tag(self, tag: &Tag) -> Result<Snapshot, Damage> {
        if self.manifest.tag == *tag {
            return Ok(self);
        }
        Err(Damage::Field {
            path: self.dir.join(MANIFEST),
            field: "tag",
            found: self.manifest.tag.to_string(),
            expected: tag.to_string(),
        })
    }
}

impl Listed {
    fn writing(tag: Tag) -> Listed {
        Listed {
            tag,
            status: Status::Writing,
            snapshot: None,
            problem: None,
        }
    }
}

impl Usage {
    fn add(&mut self, other: Usage) {
        self.logical_bytes += other.logical_bytes;
        self.physical_bytes += other.physical_bytes;
    }
}

/// Sizes of the files in a directory; what vanishes or cannot be read meanwhile does not count.
fn usage_of(dir: &Path) -> Usage {
    let mut usage = Usage::default();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(file) = fs::File::open(entry.path()) else {
            continue;
        };
        usage.add(Usage {
            logical_bytes: sparse::size(&file).unwrap_or(0),
            physical_bytes: sparse::allocated_bytes(&file).unwrap_or(0),
        });
    }
    usage
}

#[cfg(test)]
mod tests;
