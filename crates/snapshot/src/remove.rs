//! Removing snapshots, and collecting what nobody needs.
//!
//! A removal is a rename to a `.trash-` name, outermost layer first, then the deletion. So a crash at
//! any point leaves no layer without its base, and nothing that a later [`Store::gc`] cannot delete.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use forkd_host::file::{self, DirLock};
use forkd_wire::id::Tag;

use crate::check::load_manifest;
use crate::error::Error;
use crate::fault;
use crate::id::SnapshotId;
use crate::lineage::Graph;
use crate::manifest::{MANIFEST, SnapshotRef};
use crate::store::{Snapshot, Store};

/// A program being started holds copies of all our locks between its fork and its exec. So a lock that
/// was let go may seem held for a moment more; only after this long it counts as held.
const PATIENCE: Duration = Duration::from_millis(250);
/// How often it is tried.
const TICK: Duration = Duration::from_millis(5);

/// What to do about snapshots that lie over the one to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dependents {
    /// Refuse, naming them.
    Refuse,
    /// Remove them, too.
    Cascade,
    /// Take only the tag away; the files go when the last dependent goes.
    Detach,
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Tags that are gone, outermost layer first.
    pub tags: Vec<Tag>,
    /// Whether files of the snapshot are kept for its dependents.
    pub kept: bool,
}

/// Something moved out of sight, to be deleted when no lock is held that others wait for.
#[derive(Debug)]
struct Trash {
    path: PathBuf,
    _lock: DirLock,
}

impl Store {
    /// Removes a snapshot, also one that is damaged. Refuses while something uses it.
    pub fn remove(&self, tag: &Tag, dependents: Dependents) -> Result<Removed, Error> {
        let end = Instant::now() + PATIENCE;
        let (removed, trash) = loop {
            match self.try_remove(tag, dependents) {
                Err(Error::InUse { .. }) if Instant::now() < end => thread::sleep(TICK),
                done => break done?,
            }
        };
        delete(trash)?;
        Ok(removed)
    }

    /// Deletes what dead processes left, and bases that nothing needs any more. Answers how many
    /// directories.
    pub fn gc(&self) -> Result<usize, Error> {
        let bases = {
            let _names = self.lock_names()?;
            self.move_needless_bases()?
        };
        let mut count = bases.len();
        delete(bases)?;
        for stem in ["draft", "trash"] {
            count += file::sweep(self.root(), stem).map_err(Error::file)?.len();
        }
        Ok(count)
    }

    fn try_remove(
        &self,
        tag: &Tag,
        dependents: Dependents,
    ) -> Result<(Removed, Vec<Trash>), Error> {
        let _names = self.lock_names()?;
        self.move_away(tag, dependents)
    }

    fn move_away(&self, tag: &Tag, dependents: Dependents) -> Result<(Removed, Vec<Trash>), Error> {
        let dir = self.dir_of(tag);
        if dir.symlink_metadata().is_err() {
            return Err(self.absent(tag));
        }
        let known = self.known()?.snapshots;
        let own = own_reference(tag, &dir, &known);
        let over = match &own {
            Some(own) => lying_over(own, &known),
            None => Vec::new(),
        };
        match (dependents, own) {
            (Dependents::Refuse, _) if !over.is_empty() => Err(Error::HasDependents {
                tag: tag.clone(),
                dependents: over.into_iter().map(|(tag, _)| tag).collect(),
            }),
            (Dependents::Detach, Some(own)) if !over.is_empty() => {
                self.detach(&own, &dir)?;
                let (tags, kept) = (vec![tag.clone()], true);
                Ok((Removed { tags, kept }, Vec::new()))
            }
            _ => {
                let mut targets = over;
                targets.push((tag.clone(), dir));
                let trash = self.move_all(&targets)?;
                let tags = targets.into_iter().map(|(tag, _)| tag).collect();
                Ok((Removed { tags, kept: false }, trash))
            }
        }
    }

    fn detach(&self, own: &SnapshotRef, dir: &Path) -> Result<(), Error> {
        let _lock = lock(&own.tag, dir)?;
        fault::point("take the tag away");
        file::rename_new(dir, &self.base_dir_of(own)).map_err(Error::file)
    }

    /// All locks before the first change: either all go or none.
    fn move_all(&self, targets: &[(Tag, PathBuf)]) -> Result<Vec<Trash>, Error> {
        let locks = targets.iter().map(|(tag, dir)| lock(tag, dir));
        let locks = locks.collect::<Result<Vec<_>, _>>()?;
        let mut trash = Vec::with_capacity(targets.len());
        for ((_, dir), lock) in targets.iter().zip(locks) {
            trash.push(self.move_to_trash(dir, lock)?);
        }
        trash.extend(self.move_needless_bases()?);
        Ok(trash)
    }

    /// Bases without a tag that no tag needs. Those in use stay for the next time.
    fn move_needless_bases(&self) -> Result<Vec<Trash>, Error> {
        let Known {
            snapshots: known,
            all,
        } = self.known()?;
        if !all {
            // What cannot be read, perhaps because a later version wrote it, may need any of them.
            return Ok(Vec::new());
        }
        let tagged = known.iter().filter(|snapshot| !is_base(&snapshot.dir));
        let tagged: Vec<SnapshotId> = tagged
            .map(|snapshot| snapshot.manifest.id.clone())
            .collect();
        let mut trash = Vec::new();
        for id in graph(&known).garbage(&tagged) {
            let Some(snapshot) = known.iter().find(|known| known.manifest.id == id) else {
                continue;
            };
            if let Some(lock) = DirLock::exclusive(&snapshot.dir).map_err(Error::file)? {
                trash.push(self.move_to_trash(&snapshot.dir, lock)?);
            }
        }
        Ok(trash)
    }

    fn move_to_trash(&self, dir: &Path, lock: DirLock) -> Result<Trash, Error> {
        let name = SnapshotId::random().map_err(|source| Error::Random { source })?;
        let path = self.root().join(format!(".trash-{name}"));
        fault::point("rename to trash");
        file::rename_new(dir, &path).map_err(Error::file)?;
        Ok(Trash { path, _lock: lock })
    }

    /// Reads the manifests, with and without tag.
    fn known(&self) -> Result<Known, Error> {
        let mut known = Known {
            snapshots: Vec::new(),
            all: true,
        };
        for name in self.names()? {
            let dir = self.root().join(&name);
            if !is_base(&dir) && Tag::new(name).is_err() {
                continue;
            }
            match load_manifest(&dir.join(MANIFEST)) {
                Ok(manifest) => known.snapshots.push(Snapshot { dir, manifest }),
                Err(_) => known.all = false,
            }
        }
        Ok(known)
    }
}

/// What the store's directory tells.
#[derive(Debug)]
struct Known {
    snapshots: Vec<Snapshot>,
    /// Whether every manifest could be read.
    all: bool,
}

/// Takes a directory alone.
fn lock(tag: &Tag, dir: &Path) -> Result<DirLock, Error> {
    let lock = DirLock::exclusive(dir).map_err(Error::file)?;
    lock.ok_or_else(|| Error::InUse { tag: tag.clone() })
}

fn delete(trash: Vec<Trash>) -> Result<(), Error> {
    for item in trash {
        fault::point("delete trash");
        file::remove_all(&item.path).map_err(Error::file)?;
    }
    Ok(())
}

fn is_base(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with(".base-")
}

fn graph(known: &[Snapshot]) -> Graph<SnapshotId> {
    Graph::new(known.iter().map(|snapshot| {
        let over = snapshot.manifest.memory.over();
        (
            snapshot.manifest.id.clone(),
            over.map(|over| over.id.clone()),
        )
    }))
}

/// A snapshot's identity. If its manifest cannot be read, the layers over it still know.
fn own_reference(tag: &Tag, dir: &Path, known: &[Snapshot]) -> Option<SnapshotRef> {
    let own = known.iter().find(|snapshot| snapshot.dir == dir);
    let told = || {
        let overs = known
            .iter()
            .filter_map(|snapshot| snapshot.manifest.memory.over());
        let mut of_tag = overs.filter(|over| over.tag == *tag);
        of_tag.next().cloned()
    };
    own.map(|snapshot| snapshot.manifest.reference())
        .or_else(told)
}

/// Tags and directories of what lies over a snapshot, outermost first. A base without a tag among
/// them goes by the tag it had.
fn lying_over(own: &SnapshotRef, known: &[Snapshot]) -> Vec<(Tag, PathBuf)> {
    let mut over = Vec::new();
    for id in graph(known).dependents(&own.id) {
        let found = known.iter().filter(|snapshot| snapshot.manifest.id == id);
        over.extend(found.map(|snapshot| (snapshot.manifest.tag.clone(), snapshot.dir.clone())));
    }
    over
}
