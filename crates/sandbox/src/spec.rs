//! What was asked, validated. Everything behind this module may rely on it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use forkd_engine::Lifetime;
use forkd_slot::policy::Policy;
use forkd_wire::id::{SandboxId, Tag};

use crate::admission::Admission;
use crate::limits;
use crate::place::Isolation;
use crate::record::RequestId;

/// A value that is out of range; the text names it, the value and the range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidSpec(pub String);

/// The files a machine boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFiles {
    /// The image's name, for people.
    pub name: String,
    /// Digest of its inputs.
    pub digest: String,
    /// Linux kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system with the agent as `/init`.
    pub initramfs: PathBuf,
    /// Read-only root disk.
    pub rootfs: PathBuf,
}

/// What to run in the booted parent before it is frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warm {
    /// Nothing, except that an interpreter is started where the guest has one.
    Nothing,
    /// Python code in the interpreter that the forks inherit.
    Python(String),
    /// A shell command that must succeed.
    Command(String),
}

/// A snapshot to be made by booting an image.
#[derive(Debug, Clone)]
pub struct SnapshotRequest {
    /// The new snapshot's name.
    pub tag: Tag,
    /// What to boot.
    pub image: ImageFiles,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// What to run before the freeze.
    pub warm: Warm,
    /// Longest time the guest may take to answer after boot.
    pub boot_timeout: Duration,
    /// Longest time the warm-up may take.
    pub warm_timeout: Duration,
    /// Whatever the caller wants to find again in the snapshot's manifest.
    pub labels: BTreeMap<String, String>,
}

impl SnapshotRequest {
    /// A request with the defaults: 512 MiB, one vCPU, no warm-up.
    pub fn new(tag: Tag, image: ImageFiles) -> Self {
        Self {
            tag,
            image,
            memory_mib: 512,
            vcpus: 1,
            warm: Warm::Nothing,
            boot_timeout: limits::BOOT_TIMEOUT,
            warm_timeout: limits::WARM_TIMEOUT,
            labels: BTreeMap::new(),
        }
    }

    /// Checks the ranges.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        within("memory", self.memory_mib, limits::MEMORY_MIB, "MiB")?;
        within("vcpus", u64::from(self.vcpus), limits::VCPUS, "")
    }
}

/// Traffic of a VM with each disk that its files are on, each second; `None` is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct IoLimit {
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
    /// Reads.
    pub reads: Option<u64>,
    /// Writes.
    pub writes: Option<u64>,
}

impl IoLimit {
    /// Whether anything is limited.
    pub fn is_some(&self) -> bool {
        *self != Self::default()
    }

    fn validate(&self) -> Result<(), InvalidSpec> {
        let rates = [
            ("bytes read per second", self.read_bytes, limits::IO_BYTES),
            (
                "bytes written per second",
                self.write_bytes,
                limits::IO_BYTES,
            ),
            ("reads per second", self.reads, limits::IO_OPERATIONS),
            ("writes per second", self.writes, limits::IO_OPERATIONS),
        ];
        for (what, rate, range) in rates {
            if let Some(rate) = rate {
                within(what, rate, range, "")?;
            }
        }
        Ok(())
    }
}

/// Sandboxes to be forked from a snapshot.
#[derive(Debug, Clone)]
pub struct ForkRequest {
    /// The snapshot.
    pub tag: Tag,
    /// How many.
    pub n: u32,
    /// Keep what succeeded when some forks fail; otherwise one failure undoes all.
    pub partial: bool,
    /// Environment of every process in the forks.
    pub env: BTreeMap<String, String>,
    /// The caller's own words about the sandboxes.
    pub metadata: BTreeMap<String, String>,
    /// Kill the sandboxes this long after they were made.
    pub timeout: Option<Duration>,
    /// Memory limit of each VM process.
    pub memory_limit_mib: Option<u64>,
    /// Processor time of each VM process, thousandths of one processor.
    pub cpu_limit_milli: Option<u64>,
    /// Processes and threads of each VM; `None` is the default.
    pub pids_limit: Option<u64>,
    /// Traffic of each VM with disks.
    pub io_limit: IoLimit,
    /// What the guests may reach; `None` is the default, or nothing where there is no network.
    pub network: Option<Policy>,
    /// Longest time until every guest has answered.
    pub ready_timeout: Duration,
    /// Its name, if it may be repeated.
    pub repeatable: Option<RequestId>,
}

impl ForkRequest {
    /// A request for `n` sandboxes, all or nothing.
    pub fn new(tag: Tag, n: u32) -> Self {
        Self {
            tag,
            n,
            partial: false,
            env: BTreeMap::new(),
            metadata: BTreeMap::new(),
            timeout: None,
            memory_limit_mib: None,
            cpu_limit_milli: None,
            pids_limit: None,
            io_limit: IoLimit::default(),
            network: None,
            ready_timeout: limits::READY_TIMEOUT,
            repeatable: None,
        }
    }

    /// Checks the ranges.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        within("n", u64::from(self.n), limits::FORKS, "")?;
        if let Some(mib) = self.memory_limit_mib {
            within("memory limit", mib, limits::MEMORY_MIB, "MiB")?;
        }
        if let Some(milli) = self.cpu_limit_milli {
            within("processor limit", milli, limits::CPU_MILLI, "thousandths")?;
        }
        if let Some(pids) = self.pids_limit {
            within("process limit", pids, limits::PIDS, "")?;
        }
        self.io_limit.validate()?;
        for key in self.env.keys() {
            if key.is_empty() || key.contains(['=', '\0']) {
                return Err(InvalidSpec(format!(
                    "environment name {key:?} is empty or holds '=' or a NUL byte"
                )));
            }
        }
        let size: usize = pairs_len(&self.env) + pairs_len(&self.metadata);
        if size > limits::ENV_BYTES {
            return Err(InvalidSpec(format!(
                "env and metadata hold {size} bytes together, at most {} are allowed",
                limits::ENV_BYTES
            )));
        }
        Ok(())
    }
}

fn pairs_len(map: &BTreeMap<String, String>) -> usize {
    map.iter().map(|(k, v)| k.len() + v.len()).sum()
}

/// How a running sandbox is frozen.
#[derive(Debug, Clone)]
pub struct BranchRequest {
    /// The sandbox.
    pub id: SandboxId,
    /// The new snapshot's name; made up when absent.
    pub tag: Option<Tag>,
    /// Write all of memory instead of only what differs from the sandbox's snapshot.
    pub full: bool,
    /// Answer only when the files are written.
    pub wait: bool,
}

/// How a snapshot with dependents is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoveMode {
    /// Refuse, naming what depends on it.
    Refuse,
    /// Remove its descendants and kill the sandboxes of all of them.
    Cascade,
    /// Give up the name and leave what depends on it alone; its files go when nothing needs them.
    Force,
}

/// How the node behaves.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Where snapshots live.
    pub snapshot_root: PathBuf,
    /// The record of snapshots and sandboxes, an SQLite file.
    pub state: PathBuf,
    /// Sockets, consoles and other files of running VMs.
    pub run_dir: PathBuf,
    /// Whether sandboxes outlive this process.
    pub lifetime: Lifetime,
    /// How sandboxes are kept apart.
    pub isolation: Isolation,
    /// What is kept free, and how much is taken on.
    pub admission: Admission,
}

fn within(
    what: &str,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
    unit: &str,
) -> Result<(), InvalidSpec> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = (range.start(), range.end());
    let space = if unit.is_empty() { "" } else { " " };
    Err(InvalidSpec(format!(
        "{what} is {value}{space}{unit}, must be within {low}..={high}"
    )))
}

#[cfg(test)]
mod tests;
