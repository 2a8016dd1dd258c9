//! Sandboxes: making, listing, branching.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::ErrorBody;
use crate::id::{SandboxId, Tag};

/// Where older clients expect the guest; the same in every sandbox's own network.
pub const GUEST_ADDR: &str = "10.42.0.2:8888";

/// Body of `POST /v1/sandboxes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreateSandboxes {
    /// The snapshot to fork.
    pub snapshot_tag: Tag,
    /// How many sandboxes.
    #[serde(default = "default_n")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 1000))]
    pub n: u32,
    /// Keep what succeeded when some forks fail, and answer with [`PartialSandboxes`].
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub partial: bool,
    /// Environment of every process in the sandboxes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The caller's own words about the sandboxes, to filter by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Seconds after which each sandbox is killed, counted from when it was ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 31536000))]
    pub timeout_secs: Option<u64>,
    /// Memory limit of each VM process, MiB. Where a node does not enforce it, the sandbox's `not_enforced` says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 64, maximum = 262144))]
    pub memory_limit_mib: Option<u64>,
    /// Processor time of each VM process, thousandths of one processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 10, maximum = 32000))]
    pub cpu_limit_milli: Option<u64>,
    /// Processes and threads of each VM process; 512 when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 64, maximum = 32768))]
    pub pids_limit: Option<u64>,
    /// Traffic of each VM process with disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_limit: Option<IoLimit>,
    /// What the guests may reach. Without it they reach the public internet, or nothing on a node without network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
    /// Longest time until every guest has answered, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 3600))]
    pub ready_timeout_secs: Option<u64>,
    /// Accepted for older clients. Every sandbox always has a network of its own.
    #[serde(default)]
    pub per_child_netns: bool,
    /// Accepted for older clients. Forks share the template's warm pages.
    #[serde(default)]
    pub prewarm: bool,
    /// Accepted for older clients. Every sandbox can be branched while it runs.
    #[serde(default)]
    pub live_fork: bool,
    /// Accepted for older clients.
    #[serde(default)]
    pub hugepages: bool,
}

impl CreateSandboxes {
    /// A request for `n` sandboxes, with the defaults for everything else.
    pub fn new(snapshot_tag: Tag, n: u32) -> Self {
        Self {
            snapshot_tag,
            n,
            partial: false,
            env: BTreeMap::new(),
            metadata: BTreeMap::new(),
            timeout_secs: None,
            memory_limit_mib: None,
            cpu_limit_milli: None,
            pids_limit: None,
            io_limit: None,
            network: None,
            ready_timeout_secs: None,
            per_child_netns: false,
            prewarm: false,
            live_fork: false,
            hugepages: false,
        }
    }
}

fn default_n() -> u32 {
    1
}

/// Traffic of a VM process with each disk that images, snapshots and run directories are on. What is left out is
/// without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct IoLimit {
    /// Bytes read a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 4096))]
    pub read_bytes_per_sec: Option<u64>,
    /// Bytes written a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 4096))]
    pub write_bytes_per_sec: Option<u64>,
    /// Reads a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub read_iops: Option<u64>,
    /// Writes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub write_iops: Option<u64>,
}

impl IoLimit {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether a guest has a network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum NetworkMode {
    /// It reaches nothing.
    None,
    /// It reaches what its rules and the default allow.
    #[default]
    Nat,
}

/// What a guest may reach. A rule names a network, an address, a domain (`*.example.com` for all below it) or `all`,
/// and may end in a port: `10.1.0.0/16`, `192.0.2.7:443`, `example.com`, `all:25`. `allow` wins over `deny`, and both
/// over the default: the public internet. The node, link-local addresses and other sandboxes are never reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NetworkPolicy {
    /// Whether there is a network at all. Fixed when the sandbox is made.
    #[serde(default)]
    pub mode: NetworkMode,
    /// What may be reached besides the default.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// What may not be reached of the default.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
}

/// The state of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum SandboxState {
    /// Being forked.
    Starting,
    /// Its agent has answered.
    Running,
    /// Its vCPUs are stopped on request.
    Paused,
    /// Being killed.
    Stopping,
    /// Gone; `ended` says why.
    Ended,
}

/// What ended a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum SandboxEnding {
    /// Somebody asked for it.
    Killed,
    /// Its `timeout_secs` were over.
    TimedOut,
    /// The request that made it failed or was given up.
    Undone,
    /// The daemon ended and took it along.
    Closed,
    /// Its VM ended, or its guest never answered.
    Exited,
    /// Its VM used more memory than `memory_limit_mib`.
    Oom,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxInfo {
    /// Its id.
    pub id: SandboxId,
    /// The snapshot it was forked from.
    pub snapshot_tag: Tag,
    /// The network namespace it runs in, where it has one.
    #[serde(default)]
    pub netns: Option<String>,
    /// The guest's address inside its own network.
    pub guest_addr: String,
    /// When it was made.
    pub created_at_unix: u64,
    /// The VM's process on the node.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Memory limit of the VM's process, MiB.
    #[serde(default)]
    pub memory_limit_mib: Option<u64>,
    /// Processor time of the VM's process, thousandths of one processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_limit_milli: Option<u64>,
    /// Processes and threads of the VM's process, if a limit was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids_limit: Option<u64>,
    /// Traffic of the VM's process with disks, if a limit was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_limit: Option<IoLimit>,
    /// Whether a snapshot was branched from it.
    #[serde(default)]
    pub has_branched: bool,
    /// Always null; kept for older clients.
    #[serde(default)]
    pub last_branch_memory_path: Option<String>,
    /// Snapshots branched from it so far.
    #[serde(default)]
    pub branch_count: u32,
    /// Its state.
    pub state: SandboxState,
    /// Why it ended, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// What ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<SandboxEnding>,
    /// What it may reach.
    #[serde(default)]
    pub network: NetworkPolicy,
    /// The address on the node that its connections come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_address: Option<String>,
    /// Fields of this answer that are recorded, but not enforced on this node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_enforced: Vec<String>,
    /// The engine that runs it.
    #[serde(default)]
    pub engine: String,
    /// Its index within the request that made it.
    #[serde(default)]
    pub index: u32,
    /// When it will be killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_unix: Option<u64>,
    /// The caller's own words.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// How long it took to make.
    pub stages: SandboxStages,
}

/// How long the stages of a fork took, counted from the request. Zero after a restart of the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxStages {
    /// Until the VM ran.
    pub forked_ms: f64,
    /// Until the agent had answered.
    pub ready_ms: f64,
}

/// Answer of `POST /v1/sandboxes` with `partial`: one entry per fork, in order of index.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PartialSandboxes {
    /// What each fork came to.
    pub sandboxes: Vec<ForkResult>,
}

/// A sandbox, or why there is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[allow(
    clippy::large_enum_variant,
    reason = "short-lived; a box would show in every client's code"
)]
pub enum ForkResult {
    /// The fork succeeded.
    Sandbox(SandboxInfo),
    /// The fork failed.
    Failed(ErrorBody),
}

/// Query of `GET /v1/sandboxes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
pub struct ListSandboxes {
    /// Only sandboxes forked from this snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<Tag>,
    /// Only sandboxes in this state. Without it, all but those that have ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<SandboxState>,
    /// Only sandboxes with this metadata: `key=value`, several separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<String>,
    /// At most this many; the header `forkd-next` then names the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", param(minimum = 1, maximum = 10000))]
    pub limit: Option<u32>,
    /// Continue after this place, the value of `forkd-next`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// How a branch is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum BranchMode {
    /// All of memory, independent of the snapshot below.
    Full,
    /// Only what differs from the snapshot below.
    Diff,
    /// As `diff`; may be answered before the files are written.
    Live,
}

/// Body of `POST /v1/sandboxes/{id}/branch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct BranchSandbox {
    /// The new snapshot's name; made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<Tag>,
    /// How to write it; `full` when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<BranchMode>,
    /// Older form of `mode: diff`.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub diff: bool,
    /// Older form of `mode: live`.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub live: bool,
    /// Accepted for older clients: all of memory is written, and nothing more is measured.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub measure_diff: bool,
    /// Answer only when the files are written. `false` needs `mode: live`.
    #[serde(default = "default_wait")]
    pub wait: bool,
    /// With `diff`: the snapshot the caller believes to be below; refused when it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_tag: Option<Tag>,
}

impl Default for BranchSandbox {
    fn default() -> Self {
        Self {
            tag: None,
            mode: None,
            diff: false,
            live: false,
            measure_diff: false,
            wait: default_wait(),
            parent_tag: None,
        }
    }
}

fn default_wait() -> bool {
    true
}

/// Answer of `POST /v1/sandboxes/{id}/ping`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Pong {
    /// Always true.
    pub pong: bool,
    /// The agent's process in the guest.
    pub pid: u32,
    /// The interpreter `eval` uses: `python`, or `none`.
    pub agent_lang: String,
    /// Whether the guest has an interpreter for `eval`.
    pub warmup_ready: bool,
    /// The agent's version.
    pub agent_version: String,
    /// The guest's kernel release.
    pub kernel: String,
    /// How long the agent took to answer.
    pub round_trip_ms: f64,
    /// Version of numpy in the guest's Python, or `not-installed`. Left out while the interpreter is busy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numpy_version: Option<String>,
}

/// Answer of `GET /v1/sandboxes/{id}/memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemoryUse {
    /// Proportional set size: shared pages divided among their users, KiB.
    pub pss_kib: u64,
    /// Pages no other process maps, KiB.
    pub private_kib: u64,
}
