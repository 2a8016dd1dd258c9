//! What the node tells about its snapshots and sandboxes. Values, taken at one instant.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use forkd_slot::policy::Policy;
use forkd_wire::id::{SandboxId, Tag};

use crate::place::PlaceLimits;

/// The state of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotStatus {
    /// Its files are being written.
    Writing,
    /// It is on disk.
    Ready,
    /// It cannot be used, or is in memory only; [`SnapshotView::problem`] says why.
    Failed,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotView {
    /// Its name.
    pub tag: Tag,
    /// Unique over all snapshots ever made.
    pub id: String,
    /// Where its files are.
    pub dir: PathBuf,
    /// How it stands on disk.
    pub status: SnapshotStatus,
    /// Whether it can be forked: a branch can be before it is written, and where that failed.
    pub bootable: bool,
    /// Why it failed.
    pub problem: Option<String>,
    /// Seconds since the Unix epoch.
    pub created_at_unix: u64,
    /// The engine that made it.
    pub engine: String,
    /// The image it was booted from.
    pub image: String,
    /// That image's identity.
    pub image_digest: String,
    /// What was run in it before the freeze.
    pub warm: Option<String>,
    /// What its maker wanted to find again; the node adds `boot_ms`, `warm_ms` and `save_ms`.
    pub labels: BTreeMap<String, String>,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The snapshot below, if it is a branch.
    pub parent: Option<Tag>,
    /// The sandbox it was branched from.
    pub branched_from: Option<SandboxId>,
    /// How long the guest stood still when it was branched.
    pub pause: Option<Duration>,
    /// Bytes of memory the guest sees.
    pub memory_logical_bytes: u64,
    /// Bytes its files take on disk.
    pub physical_bytes: u64,
    /// Whether it holds only what differs from its parent.
    pub layered: bool,
}

/// How long the stages of making a snapshot took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SnapshotStages {
    /// From the start of the VM to the agent's first answer.
    pub boot: Duration,
    /// The warm-up.
    pub warm: Duration,
    /// From the freeze to the published snapshot.
    pub save: Duration,
}

/// A step of making a snapshot, told while it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotStep {
    /// The VM is starting and booting.
    Booting,
    /// The agent has answered; the warm-up runs.
    Warming,
    /// The machine is frozen and being written.
    Saving,
    /// The files are hashed and published.
    Publishing,
}

/// The state of a sandbox, as users see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SandboxStatus {
    /// Being forked.
    Starting,
    /// Its agent has answered.
    Running,
    /// Its vCPUs are stopped on request.
    Paused,
    /// Being killed.
    Stopping,
    /// Gone; [`SandboxView::ended`] says why.
    Ended,
}

/// What ended a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ending {
    /// Somebody asked for it.
    Killed,
    /// Its time was up.
    TimedOut,
    /// The request that made it failed or was given up.
    Undone,
    /// The daemon ended and took it along.
    Closed,
    /// Its VM ended, or never became ready.
    Exited,
    /// It used more memory than it may.
    OutOfMemory,
}

/// What a sandbox reaches, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkView {
    /// Its network namespace; `None` is no network.
    pub netns: Option<String>,
    /// The address on the host that its connections come from.
    pub address: Option<std::net::Ipv4Addr>,
    /// What it may reach.
    pub policy: Policy,
}

/// How long the stages of a fork took, counted from the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForkStages {
    /// Until the VM ran.
    pub forked: Duration,
    /// Until the agent had answered `resume`.
    pub ready: Duration,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxView {
    /// Its id.
    pub id: SandboxId,
    /// The snapshot it was forked from.
    pub tag: Tag,
    /// Its index within the request that made it.
    pub index: u32,
    /// Its state.
    pub status: SandboxStatus,
    /// Why it ended, in words.
    pub ended: Option<String>,
    /// What ended it.
    pub ending: Option<Ending>,
    /// The VM's process.
    pub pid: Option<u32>,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// The engine that runs it.
    pub engine: String,
    /// Seconds since the Unix epoch.
    pub created_at_unix: u64,
    /// When it will be killed, seconds since the Unix epoch.
    pub deadline_unix: Option<u64>,
    /// The caller's own words.
    pub metadata: BTreeMap<String, String>,
    /// Memory limit of the VM's process.
    pub memory_limit_mib: Option<u64>,
    /// Its other limits.
    pub limits: PlaceLimits,
    /// Limits that were asked for and are only recorded, by the names that requests give them.
    pub not_enforced: Vec<String>,
    /// What it reaches.
    pub network: NetworkView,
    /// How long it took to make; zero after a restart of the daemon.
    pub stages: ForkStages,
    /// Snapshots branched from it so far.
    pub branches: u32,
}

/// Memory of a VM's process, KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Proportional set size: shared pages divided among their users.
    pub pss_kib: u64,
    /// Pages no other process maps.
    pub private_kib: u64,
}

/// What a fork request came to.
#[derive(Debug)]
pub struct ForkOutcome {
    /// One entry per fork, in order of index.
    pub children: Vec<Result<SandboxView, crate::Error>>,
    /// Until the template could be forked; zero when it was warm.
    pub template: Duration,
    /// Until the last VM ran, from the request.
    pub forked: Duration,
    /// Until the last agent had answered, from the request.
    pub ready: Duration,
}

/// A snapshot that was made, and how long it took.
#[derive(Debug, Clone)]
pub struct SnapshotOutcome {
    /// The snapshot.
    pub snapshot: SnapshotView,
    /// How long its stages took.
    pub stages: SnapshotStages,
}

/// What was found and done when the node opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Sandboxes of an earlier daemon that run on.
    pub adopted: Vec<SandboxId>,
    /// Sandboxes that were gone, and why.
    pub lost: Vec<(SandboxId, String)>,
    /// Processes, files and half-written snapshots that were removed.
    pub swept: Vec<String>,
}

/// How the node is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// Kill every sandbox.
    KillAll,
    /// Leave sandboxes running for the next daemon.
    Leave,
}
