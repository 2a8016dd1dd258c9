//! A snapshot being written, and its publication.
//!
//! ```text
//!   begin ──► .draft-<tag>/ ──engine writes──► publish: check, hash, sync, manifest, rename ──► <tag>/
//!               │
//!               └─ dropped, failed, or its process died: removed
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use forkd_host::file::{self, TempDir};
use forkd_wire::id::Tag;

use crate::check::{file_names, file_size, open, read_index};
use crate::content::content_hash;
use crate::error::{Damage, Error};
use crate::fault;
use crate::id::SnapshotId;
use crate::lineage;
use crate::manifest::{
    FileEntry, INDEX, Image, Lineage, MANIFEST, MANIFEST_BYTES_MAX, MEMORY, Machine, Manifest,
    Memory, SCHEMA_VERSION, STATE, SnapshotRef,
};
use crate::store::{Snapshot, Store};

/// A snapshot being written. The tag is taken while this lives; unless published, it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    tag: Tag,
    id: SnapshotId,
    dir: TempDir,
}

/// What a manifest says beyond what the store knows itself.
#[derive(Debug, Clone)]
pub struct ManifestDraft {
    /// The engine that wrote the files.
    pub engine: String,
    /// The machine that was frozen.
    pub machine: Machine,
    /// What it had booted.
    pub image: Image,
    /// Whether all of RAM was written.
    pub memory: MemoryDraft,
    /// Where it came from.
    pub lineage: Lineage,
    /// Facts about the host that the engine compares before using it.
    pub compatibility: BTreeMap<String, String>,
    /// What was done to warm it up.
    pub warm: Option<String>,
    /// Whatever the maker wants to find again.
    pub labels: BTreeMap<String, String>,
}

/// How RAM was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryDraft {
    /// All of it, into [`Draft::memory_path`].
    Full,
    /// What differs from a published snapshot, into [`Draft::memory_path`] and [`Draft::index_path`].
    Layer {
        /// The snapshot below.
        over: SnapshotRef,
    },
}

impl Store {
    /// Takes a tag and a directory for a new snapshot.
    pub fn begin(&self, tag: &Tag) -> Result<Draft, Error> {
        let id = SnapshotId::random().map_err(|source| Error::Random { source })?;
        self.begin_again(tag, id)
    }

    /// The same for a snapshot whose draft was given up, under the id that it was to have.
    pub fn begin_again(&self, tag: &Tag, id: SnapshotId) -> Result<Draft, Error> {
        let claimed = TempDir::claim(self.root(), "draft", tag.as_str());
        let dir = match claimed {
            Ok(dir) => dir,
            Err(file::Error::Locked { .. }) => {
                return Err(Error::InProgress { tag: tag.clone() });
            }
            Err(error) => return Err(Error::file(error)),
        };
        // Looked at with the claim in hand: from here on nobody else can publish the tag.
        if self.dir_of(tag).symlink_metadata().is_ok() {
            return Err(Error::Exists { tag: tag.clone() });
        }
        Ok(Draft {
            store: self.clone(),
            tag: tag.clone(),
            id,
            dir,
        })
    }
}

impl Draft {
    /// The id the snapshot will have.
    pub fn id(&self) -> &SnapshotId {
        &self.id
    }

    /// The tag the snapshot will have.
    pub fn tag(&self) -> &Tag {
        &self.tag
    }

    /// The name and id the snapshot will have.
    pub fn reference(&self) -> SnapshotRef {
        SnapshotRef {
            tag: self.tag.clone(),
            id: self.id.clone(),
        }
    }

    /// Where RAM is to be written; the file does not exist yet.
    pub fn memory_path(&self) -> PathBuf {
        self.dir.path().join(MEMORY)
    }

    /// Where a layer's index is to be written; only for a layer.
    pub fn index_path(&self) -> PathBuf {
        self.dir.path().join(INDEX)
    }

    /// Where device state is to be written.
    pub fn state_path(&self) -> PathBuf {
        self.dir.path().join(STATE)
    }

    /// Gives the tag back and removes what was written.
    pub fn discard(self) -> Result<(), Error> {
        self.dir.remove().map_err(Error::file)
    }

    /// Makes the snapshot visible, whole and durable. On failure nothing is left of it.
    pub fn publish(self, about: ManifestDraft) -> Result<Snapshot, Error> {
        let memory = match about.memory {
            MemoryDraft::Full => Memory::Full,
            MemoryDraft::Layer { ref over } => {
                self.check_layer(over)?;
                Memory::Layer { over: over.clone() }
            }
        };
        self.remove_strangers(&memory)?;
        let names = file_names(&memory);
        let files = names.iter().map(|name| self.seal(name));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            id: self.id.clone(),
            tag: self.tag.clone(),
            created_at_ms: now_ms(),
            engine: about.engine,
            machine: about.machine,
            image: about.image,
            lineage: about.lineage,
            memory,
            files,
            compatibility: about.compatibility,
            warm: about.warm,
            labels: about.labels,
            unknown: BTreeMap::new(),
        };
        self.write_manifest(&manifest)?;
        self.rename(manifest)
    }

    /// A layer must decode, fit to its memory file, and lie over something usable.
    fn check_layer(&self, over: &SnapshotRef) -> Result<(), Error> {
        let chain = self.store.resolve(over).map_err(self.unpublishable())?;
        if chain.len() >= lineage::DEPTH_MAX {
            return Err(self.unpublishable()(lineage::Error::TooDeep.into()));
        }
        let size = file_size(&self.memory_path()).map_err(self.unpublishable())?;
        read_index(&self.index_path(), size).map_err(self.unpublishable())?;
        Ok(())
    }

    fn unpublishable(&self) -> impl FnOnce(Damage) -> Error {
        let tag = self.tag.clone();
        move |damage| Error::Unpublishable { tag, damage }
    }

    /// Only the files that the manifest will list become part of a snapshot.
    fn remove_strangers(&self, memory: &Memory) -> Result<(), Error> {
        let list = fs::read_dir(self.dir.path());
        let unreadable = |source| {
            let (step, path) = ("list", self.dir.path().to_owned());
            Error::file(file::Error::Io { step, path, source })
        };
        for entry in list.map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name();
            if !file_names(memory).iter().any(|known| name == *known) {
                file::remove_all(&entry.path()).map_err(Error::file)?;
            }
        }
        Ok(())
    }

    /// Hashes a file and makes it durable.
    fn seal(&self, name: &'static str) -> Result<FileEntry, Error> {
        fault::point("seal a file");
        let path = self.dir.path().join(name);
        let size = file_size(&path).map_err(self.unpublishable())?;
        let failed = |source| Damage::Content {
            path: path.clone(),
            source,
        };
        let file = open(&path).map_err(self.unpublishable())?;
        let blake3 = content_hash(&file).map_err(failed);
        let blake3 = blake3.map_err(self.unpublishable())?;
        file::sync_file(&path).map_err(Error::file)?;
        Ok(FileEntry {
            name: name.to_owned(),
            size,
            blake3,
        })
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), Error> {
        fault::point("write the manifest");
        let failed = |source: io::Error| Error::Manifest {
            tag: self.tag.clone(),
            source,
        };
        let bytes = manifest.encode().map_err(|source| failed(source.into()))?;
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            let long = format!("{} bytes, at most {MANIFEST_BYTES_MAX}", bytes.len());
            return Err(failed(io::Error::other(long)));
        }
        file::write_synced(&self.dir.path().join(MANIFEST), &bytes).map_err(Error::file)?;
        fault::point("sync the draft");
        file::sync_dir(self.dir.path()).map_err(Error::file)
    }

    /// The moment of publication.
    fn rename(self, manifest: Manifest) -> Result<Snapshot, Error> {
        let _names = self.store.lock_names()?;
        if let Some(over) = manifest.memory.over() {
            // It may have been removed since it was checked; now it cannot be.
            self.store.resolve(over).map_err(self.unpublishable())?;
        }
        let dir = self.store.dir_of(&self.tag);
        fault::point("rename into place");
        match self.dir.publish(&dir) {
            Ok(()) => {}
            Err(file::Error::Exists { .. }) => return Err(Error::Exists { tag: self.tag }),
            Err(error) => return Err(Error::file(error)),
        }
        fault::point("answer");
        Ok(Snapshot { dir, manifest })
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    // A clock before 1970 is no reason to fail.
    since.map_or(0, |since| since.as_millis() as u64)
}
