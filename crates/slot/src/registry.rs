//! Who uses which number: one small file for each slot, shared by every node of this host.
//!
//! Several nodes may run on one host, a daemon and a command beside it. Names of namespaces and devices are the host's,
//! so a number belongs to one owner only: a node, or the reserve of slots that were made ahead for any node. A node that
//! runs holds a lock, which the kernel ends with its process; a node that is gone for good is one that does not run and
//! whose state file is no more. The files lie where a reboot clears them, as it clears the namespaces.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use forkd_host::file::{self, DirLock, LockFile};

use crate::address::MAX_SLOTS;

/// Where the files are.
pub const DIRECTORY: &str = "/run/forkd-slots";

/// The owner of slots that wait for any node.
const RESERVE: &str = "reserve";
/// Directories that running nodes hold locks on, named by their owners' digests.
const NODES: &str = "nodes";
/// Empty files, named by the numbers in the reserve.
const READY: &str = "reserve";
/// Held while numbers go from one owner to another.
const MOVES: &str = "moves.lock";

/// The registry cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of it.
    #[error("cannot {step} {}", .path.display())]
    File {
        /// What was being done.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A lock of it.
    #[error(transparent)]
    Lock(#[from] file::Error),
}

/// The numbers, as one owner sees them. As long as one of its clones lives, the owner counts as running.
#[derive(Debug, Clone)]
pub struct Registry {
    directory: PathBuf,
    owner: String,
    /// Numbers that were in the reserve when it was last looked at: to list it for each that is taken would cost more
    /// with every slot there.
    seen: Arc<Mutex<VecDeque<u32>>>,
    _running: Option<Arc<DirLock>>,
}

/// A number that somebody has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The number.
    pub index: u32,
    /// Who has it.
    pub owner: String,
}

/// What is known of an owner. The owner cannot begin to run as long as this is held.
#[derive(Debug)]
pub enum Standing {
    /// It is the reserve.
    Reserve,
    /// A node that runs.
    Running,
    /// A node that does not run but may again: its state file is there.
    Stopped(DirLock),
    /// A node that is no more.
    Gone(DirLock),
}

impl Registry {
    /// Opens the registry for a node. `owner` is the path of its state file: the same after a restart and unlike any
    /// other on this host. Waits while somebody sweeps what the node left.
    pub fn open(directory: &Path, owner: &str) -> Result<Self, Error> {
        let nodes = directory.join(NODES);
        let own = node_directory(directory, owner);
        let running = loop {
            make_private(&nodes)?;
            // Nobody may look for running nodes between these two.
            let Some(_counted) = DirLock::shared(&nodes)? else {
                continue;
            };
            make_private(&own)?;
            // Gone again: somebody swept between these two.
            if let Some(lock) = DirLock::shared(&own)? {
                break lock;
            }
        };
        Ok(Self {
            directory: directory.to_owned(),
            owner: owner.to_owned(),
            seen: Arc::default(),
            _running: Some(Arc::new(running)),
        })
    }

    /// Opens the registry for the reserve.
    pub fn reserve(directory: &Path) -> Result<Self, Error> {
        make_private(&directory.join(NODES))?;
        make_private(&directory.join(READY))?;
        Ok(Self {
            directory: directory.to_owned(),
            owner: RESERVE.to_owned(),
            seen: Arc::default(),
            _running: None,
        })
    }

    /// Takes a number; `false` when somebody has it. Also when that is the same owner: then it is in use, or could not
    /// be removed.
    pub fn claim(&self, index: u32) -> Result<bool, Error> {
        let path = self.path(index);
        // Linked when it is whole: a file without an owner in it would belong to nobody for ever.
        let partial = self.write_partial(index)?;
        let linked = fs::hard_link(&partial, &path);
        let _ = fs::remove_file(&partial);
        match linked {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(failed("write", &path)(e)),
        }
    }

    /// Gives a number back.
    pub fn release(&self, index: u32) -> Result<(), Error> {
        remove(&self.ready(index))?;
        remove(&self.path(index))
    }

    /// The numbers that are ours.
    pub fn ours(&self) -> Result<Vec<u32>, Error> {
        let claims = self.claims()?.into_iter();
        Ok(claims
            .filter(|claim| claim.owner == self.owner)
            .map(|claim| claim.index)
            .collect())
    }

    /// All numbers that somebody has, in order.
    pub fn claims(&self) -> Result<Vec<Claim>, Error> {
        let claim = |index| {
            let owner = fs::read_to_string(self.path(index)).ok()?;
            Some(Claim { index, owner })
        };
        Ok(numbers_in(&self.directory)?
            .into_iter()
            .filter_map(claim)
            .collect())
    }

    /// Who has a number.
    pub fn owner_of(&self, index: u32) -> Result<Option<String>, Error> {
        let path = self.path(index);
        match fs::read_to_string(&path) {
            Ok(owner) => Ok(Some(owner)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("read", &path)(e)),
        }
    }

    /// Puts a slot of ours into the reserve: from now on any node may take it.
    pub fn offer(&self, index: u32) -> Result<(), Error> {
        let path = self.ready(index);
        File::create(&path)
            .map(drop)
            .map_err(failed("write", &path))
    }

    /// The numbers in the reserve, in order.
    pub fn offered(&self) -> Result<Vec<u32>, Error> {
        numbers_in(&self.directory.join(READY))
    }

    /// Takes a slot out of the reserve, if one is there.
    pub fn take_offered(&self) -> Result<Option<u32>, Error> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if seen.is_empty() {
                seen.extend(self.offered()?);
            }
            // Most hosts have no reserve; they are spared the lock.
            let Some(index) = seen.pop_front() else {
                return Ok(None);
            };
            let _moving = self.moves()?;
            // Somebody else may have taken it since.
            let path = self.ready(index);
            if path.try_exists().map_err(failed("look at", &path))? {
                self.seize(index)?;
                return Ok(Some(index));
            }
        }
    }

    /// Keeps numbers with their owners until it is dropped.
    pub(crate) fn moves(&self) -> Result<LockFile, Error> {
        Ok(LockFile::wait(&self.directory.join(MOVES))?)
    }

    /// Makes a number ours, whoever has it. The caller holds [`Registry::moves`].
    pub(crate) fn seize(&self, index: u32) -> Result<(), Error> {
        let (partial, path) = (self.write_partial(index)?, self.path(index));
        fs::rename(&partial, &path).map_err(failed("write", &path))?;
        remove(&self.ready(index))
    }

    /// What is known of an owner now.
    pub fn standing(&self, owner: &str) -> Result<Standing, Error> {
        if owner == RESERVE {
            return Ok(Standing::Reserve);
        }
        let directory = node_directory(&self.directory, owner);
        make_private(&directory)?;
        let Some(lock) = DirLock::exclusive(&directory)? else {
            return Ok(Standing::Running);
        };
        let state = Path::new(owner);
        // What cannot be looked at may be there.
        let is_gone = state.is_absolute() && state.try_exists().is_ok_and(|there| !there);
        Ok(match is_gone {
            true => Standing::Gone(lock),
            false => Standing::Stopped(lock),
        })
    }

    /// Forgets the locks of nodes that do not run.
    pub(crate) fn forget_nodes(&self) -> Result<(), Error> {
        let nodes = self.directory.join(NODES);
        for entry in fs::read_dir(&nodes).map_err(failed("list", &nodes))? {
            let path = entry.map_err(failed("list", &nodes))?.path();
            if let Some(_lock) = DirLock::exclusive(&path)? {
                fs::remove_dir(&path).map_err(failed("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Runs `work` if no node runs, and keeps every node from beginning to until it has ended.
    pub(crate) fn alone<T>(&self, work: impl FnOnce() -> T) -> Result<Option<T>, Error> {
        let nodes = self.directory.join(NODES);
        let Some(_alone) = DirLock::exclusive(&nodes)? else {
            return Ok(None);
        };
        for entry in fs::read_dir(&nodes).map_err(failed("list", &nodes))? {
            let path = entry.map_err(failed("list", &nodes))?.path();
            if DirLock::exclusive(&path)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(work()))
    }

    /// The file with our name in it that is to become the claim.
    fn write_partial(&self, index: u32) -> Result<PathBuf, Error> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("{index}.{}.{next}", std::process::id());
        let partial = self.directory.join(name);
        File::create(&partial)
            .and_then(|mut file| file.write_all(self.owner.as_bytes()))
            .map_err(failed("write", &partial))?;
        Ok(partial)
    }

    fn path(&self, index: u32) -> PathBuf {
        self.directory.join(index.to_string())
    }

    fn ready(&self, index: u32) -> PathBuf {
        self.directory.join(READY).join(index.to_string())
    }
}

fn node_directory(directory: &Path, owner: &str) -> PathBuf {
    let digest = blake3::hash(owner.as_bytes()).to_hex();
    directory.join(NODES).join(&digest[..32])
}

/// The slots' numbers that files in a directory are named by, in order. No directory, no numbers.
fn numbers_in(directory: &Path) -> Result<Vec<u32>, Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(failed("list", directory)(e)),
    };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut numbers: Vec<u32> = numbers.filter(|index| *index < MAX_SLOTS).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Makes a directory that only its owner may open: whoever may open it may lock it.
fn make_private(path: &Path) -> Result<(), Error> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(failed("make", path))
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

fn failed<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::File {
        step,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_one_owner_who_finds_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let open = |owner| Registry::open(dir.path(), owner).unwrap();
        let (ours, theirs) = (open("/var/lib/one"), open("/var/lib/two"));
        assert!(ours.claim(3).unwrap());
        assert!(!ours.claim(3).unwrap(), "it is in use");
        assert!(!theirs.claim(3).unwrap());
        assert!(theirs.claim(4).unwrap());
        // After a crash.
        assert_eq!(open("/var/lib/one").ours().unwrap(), [3]);
        ours.release(3).unwrap();
        ours.release(3).unwrap();
        assert!(theirs.claim(3).unwrap());
        assert_eq!(
            (ours.ours().unwrap(), theirs.ours().unwrap()),
            (vec![], vec![3, 4])
        );
    }

    #[test]
    fn a_node_runs_stops_and_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state.db");
        fs::write(&state, "").unwrap();
        let owner = state.to_str().unwrap();
        let slots = dir.path().join("slots");
        let watcher = Registry::reserve(&slots).unwrap();
        let standing = || watcher.standing(owner).unwrap();
        let node = Registry::open(&slots, owner).unwrap();
        let copy = node.clone();
        drop(node);
        assert!(matches!(standing(), Standing::Running), "a clone lives");
        assert_eq!(watcher.alone(|| ()).unwrap(), None);
        drop(copy);
        assert!(matches!(standing(), Standing::Stopped(_)));
        fs::remove_file(&state).unwrap();
        let Standing::Gone(held) = standing() else {
            panic!("{:?}", standing());
        };
        assert!(matches!(standing(), Standing::Running), "somebody sweeps");
        // It comes back when the sweep is over, not before.
        let (slots, owner) = (slots.clone(), owner.to_owned());
        let coming = std::thread::spawn(move || Registry::open(&slots, &owner).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!coming.is_finished());
        drop(held);
        let _node = coming.join().unwrap();
        assert!(matches!(standing(), Standing::Running));
        watcher.forget_nodes().unwrap();
        assert!(matches!(standing(), Standing::Running), "it was forgotten");
        assert!(
            matches!(watcher.standing("state.db").unwrap(), Standing::Stopped(_)),
            "whether a relative path is there nobody can say"
        );
    }

    #[test]
    fn a_slot_of_the_reserve_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Registry::reserve(dir.path()).unwrap();
        for index in 0..20 {
            assert!(reserve.claim(index).unwrap());
            reserve.offer(index).unwrap();
        }
        let nodes = ["/one", "/two"].map(|owner| Registry::open(dir.path(), owner).unwrap());
        let take = |node: &Registry| -> Vec<u32> {
            std::iter::from_fn(|| node.take_offered().unwrap()).collect()
        };
        let taken = std::thread::scope(|scope| {
            let threads = nodes.each_ref().map(|node| scope.spawn(|| take(node)));
            threads.map(|thread| thread.join().unwrap())
        });
        let mut all = taken.concat();
        all.sort_unstable();
        assert_eq!(all, (0..20).collect::<Vec<_>>());
        assert!(reserve.ours().unwrap().is_empty());
        for (node, taken) in nodes.iter().zip(&taken) {
            assert_eq!(node.ours().unwrap(), *taken);
        }
    }
}
