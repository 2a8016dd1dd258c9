//! Whether the node has room for more. A refusal before the first effect costs nothing; a host that begins to swap or
//! to kill costs every sandbox on it.
//!
//! [`decide`] is pure: bounds, what is asked and what there is in, a refusal out. A [`Ledger`] looks at the host, and
//! keeps in mind what was let in but does not show yet, so that requests which come together do not share one place.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use forkd_host::file::{self, Space};
use forkd_host::{cgroup, facts};
use forkd_wire::error::ErrorCode;

use crate::Error;

mod decide;

use decide::{Found, Load, Refusal, decide};

const MIB: u64 = 1024 * 1024;

/// What a node keeps free, and how much it takes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// Sandboxes there may be.
    pub sandboxes_max: u32,
    /// Virtual CPUs of all sandboxes together, for each processor that the daemon may use; `None` is without bound.
    pub vcpus_per_cpu: Option<u32>,
    /// Memory that is left to everything else, MiB.
    pub memory_reserve_mib: u64,
    /// Disk that is left free where snapshots, records and run directories are, MiB; a sixteenth of a file system
    /// where that is less.
    pub disk_reserve_mib: u64,
}

impl Default for Admission {
    /// What keeps a host from tipping over, and refuses nothing that it can carry. How many virtual CPUs a processor
    /// carries depends on what they do, so there is no bound.
    fn default() -> Self {
        Self {
            sandboxes_max: 4000,
            vcpus_per_cpu: None,
            memory_reserve_mib: 128,
            disk_reserve_mib: 256,
        }
    }
}

/// What bounds a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// The number of sandboxes.
    Sandboxes,
    /// Their virtual CPUs.
    Vcpus,
    /// Disk.
    Disk,
    /// Memory of the host, or of the control group that the daemon is in.
    Memory,
}

impl Resource {
    /// All of them, in the order in which they are judged.
    pub const ALL: [Resource; 4] = [Self::Sandboxes, Self::Vcpus, Self::Disk, Self::Memory];

    /// Its name, as metrics write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sandboxes => "sandboxes",
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }
}

/// How much room a node has, at one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The bounds.
    pub bounds: Admission,
    /// Sandboxes there are.
    pub sandboxes: u64,
    /// Their virtual CPUs.
    pub vcpus: u64,
    /// How many virtual CPUs there may be; `None` is without bound.
    pub vcpus_max: Option<u64>,
    /// Memory that can be used, MiB, the reserve included; `None` where the host does not tell.
    pub memory_available_mib: Option<u64>,
    /// Disk that can be used where snapshots are, MiB, the reserve included; `None` where the host does not tell.
    pub disk_available_mib: Option<u64>,
    /// Why not one more sandbox would be let in.
    pub full: Option<String>,
    /// Requests refused since the node was opened, in the order of [`Resource::ALL`].
    pub refused: [u64; 4],
}

/// Where to look.
#[derive(Debug)]
pub(crate) struct Places {
    /// Where snapshots are. Forks write nothing there: a branch in memory can be forked while it cannot be written.
    pub(crate) snapshots: PathBuf,
    /// Where sandboxes are written down.
    pub(crate) records: PathBuf,
    /// Where the files of running VMs are.
    pub(crate) run: PathBuf,
    /// The group that sandboxes' groups are in.
    pub(crate) group: Option<PathBuf>,
}

/// Lets in and refuses.
#[derive(Debug)]
pub(crate) struct Ledger {
    bounds: Admission,
    places: Places,
    /// What was let in, and does not show yet in what the host and the list of sandboxes tell.
    promised: Mutex<Load>,
    refused: [AtomicU64; 4],
}

/// Room that was promised, until it is dropped.
#[derive(Debug)]
pub(crate) struct Promise {
    ledger: Arc<Ledger>,
    what: String,
    load: Load,
}

impl Ledger {
    pub(crate) fn new(bounds: Admission, places: Places) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            places,
            promised: Mutex::default(),
            refused: Default::default(),
        })
    }

    /// Room for so many more sandboxes, of which each will take this much memory for itself. `running` tells what the
    /// list of sandboxes holds, as sandboxes and virtual CPUs.
    pub(crate) fn sandboxes(
        self: &Arc<Self>,
        what: String,
        sandboxes: u32,
        memory_mib: u64,
        running: impl FnOnce() -> (u64, u64),
    ) -> Result<Promise, Error> {
        let sandboxes = u64::from(sandboxes);
        let load = Load {
            sandboxes,
            memory_mib: memory_mib.saturating_mul(sandboxes),
            ..Load::default()
        };
        self.promise(what, load, running)
    }

    /// Room for a machine that is no sandbox.
    pub(crate) fn memory(self: &Arc<Self>, what: String, mib: u64) -> Result<Promise, Error> {
        let load = Load {
            memory_mib: mib,
            ..Load::default()
        };
        self.promise(what, load, || (0, 0))
    }

    /// Bytes that must be free where snapshots are, over what is to be written there.
    pub(crate) fn disk_reserve_bytes(&self) -> u64 {
        let space = file::space(&self.places.snapshots).ok();
        space.map_or(0, |space| self.reserve_of(space))
    }

    /// How much room there is.
    pub(crate) fn room(&self, running: (u64, u64)) -> Room {
        let found = self.look(running, Load::default());
        let one = Load {
            sandboxes: 1,
            vcpus: 1,
            memory_mib: 0,
        };
        Room {
            bounds: self.bounds,
            sandboxes: running.0,
            vcpus: running.1,
            vcpus_max: found.vcpus_max,
            memory_available_mib: found.memory_mib,
            disk_available_mib: space_mib(&self.places.snapshots),
            full: decide(&self.bounds, one, &found)
                .err()
                .map(|r| r.to_string()),
            refused: Resource::ALL.map(|r| self.refused[r as usize].load(Ordering::Relaxed)),
        }
    }

    fn promise(
        self: &Arc<Self>,
        what: String,
        load: Load,
        running: impl FnOnce() -> (u64, u64),
    ) -> Result<Promise, Error> {
        let mut promise = Promise {
            ledger: Arc::clone(self),
            what,
            load: Load::default(),
        };
        promise.add(load, running)?;
        Ok(promise)
    }

    fn look(&self, running: (u64, u64), promised: Load) -> Found {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let short = [&self.places.records, &self.places.run];
        let short = short.into_iter().find_map(|path| self.short_of_disk(path));
        Found {
            sandboxes: running.0 + promised.sandboxes,
            vcpus: running.1 + promised.vcpus,
            vcpus_max: self.bounds.vcpus_per_cpu.map(|n| u64::from(n) * cpus),
            memory_mib: self.available_mib(),
            promised_mib: promised.memory_mib,
            short_of_disk: short,
        }
    }

    /// A path with too little space, and how much there is and must be, MiB. One that cannot be asked has enough: what
    /// is wrong with it will be told better by whoever writes there.
    fn short_of_disk(&self, path: &Path) -> Option<(PathBuf, u64, u64)> {
        let space = file::space(path).ok()?;
        let reserve = self.reserve_of(space);
        (space.free < reserve).then(|| (path.to_owned(), space.free / MIB, reserve / MIB))
    }

    /// A small file system, such as one in memory, cannot be asked to leave as much free as a disk.
    fn reserve_of(&self, space: Space) -> u64 {
        (self.bounds.disk_reserve_mib.saturating_mul(MIB)).min(space.total / 16)
    }

    fn available_mib(&self) -> Option<u64> {
        let host = facts::memory();
        let host = (host.total_bytes > 0).then_some(host.available_bytes);
        let groups = [cgroup::own_group(), self.places.group.clone()];
        let groups = groups
            .iter()
            .flatten()
            .filter_map(|group| cgroup::memory_headroom(group));
        host.into_iter()
            .chain(groups)
            .min()
            .map(|bytes| bytes / MIB)
    }
}

impl Promise {
    /// Room for the virtual CPUs of the same sandboxes.
    pub(crate) fn vcpus(
        &mut self,
        each: u32,
        running: impl FnOnce() -> (u64, u64),
    ) -> Result<(), Error> {
        let load = Load {
            vcpus: u64::from(each) * self.load.sandboxes,
            ..Load::default()
        };
        self.add(load, running)
    }

    /// The sandboxes are in the list now, and count there. What they will take of memory does not show yet.
    pub(crate) fn listed(&mut self) {
        let listed = Load {
            memory_mib: 0,
            ..self.load
        };
        self.take_off(listed);
    }

    fn add(&mut self, load: Load, running: impl FnOnce() -> (u64, u64)) -> Result<(), Error> {
        let mut promised = lock(&self.ledger.promised);
        // Asked while the promises are held: whoever leaves them is in the list by then.
        let found = self.ledger.look(running(), *promised);
        match decide(&self.ledger.bounds, load, &found) {
            Ok(()) => {
                *promised = promised.plus(load);
                self.load = self.load.plus(load);
                Ok(())
            }
            Err(refusal) => {
                let count = &self.ledger.refused[refusal.resource() as usize];
                count.fetch_add(1, Ordering::Relaxed);
                Err(refused(&self.what, &refusal))
            }
        }
    }

    fn take_off(&mut self, load: Load) {
        let mut promised = lock(&self.ledger.promised);
        *promised = promised.minus(load);
        self.load = self.load.minus(load);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.take_off(self.load);
    }
}

fn lock(promised: &Mutex<Load>) -> std::sync::MutexGuard<'_, Load> {
    promised.lock().unwrap_or_else(PoisonError::into_inner)
}

fn space_mib(path: &Path) -> Option<u64> {
    file::space(path).ok().map(|space| space.free / MIB)
}

fn refused(what: &str, refusal: &Refusal) -> Error {
    let (code, remedy) = match refusal.resource() {
        Resource::Sandboxes => (
            ErrorCode::Busy,
            "kill sandboxes (`forkd ls`, `forkd kill ID`) and try again, or raise --max-sandboxes of the daemon",
        ),
        Resource::Vcpus => (
            ErrorCode::Busy,
            "kill sandboxes (`forkd ls`, `forkd kill ID`) and try again, or raise --max-vcpus-per-cpu of the daemon",
        ),
        Resource::Memory => (
            ErrorCode::InsufficientResources,
            "kill sandboxes (`forkd ls`, `forkd kill ID`), ask for fewer, or use a smaller --memory",
        ),
        Resource::Disk => (
            ErrorCode::InsufficientResources,
            "remove snapshots or images (`forkd rmi TAG`, `forkd image rm NAME`), or free space there",
        ),
    };
    Error::new(code, format!("no room for {what}: {refusal}")).with_remedy(remedy)
}

#[cfg(test)]
mod tests;
