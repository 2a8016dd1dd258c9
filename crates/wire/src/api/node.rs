//! What the daemon tells about itself and about the node as a whole.

use serde::{Deserialize, Serialize};

use super::sandbox::SandboxState;
use crate::id::{SandboxId, Tag};

/// Answer of `GET /healthz`: the process lives. Says nothing else, because nobody is asked for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Healthy {
    /// Always true.
    pub ok: bool,
}

/// Answer of `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// The interface's version, `v1`.
    pub api: String,
    /// The engine that runs new sandboxes.
    #[serde(default)]
    pub engine: String,
    /// What that engine can do; left out by daemons that do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<EngineCapabilities>,
}

/// What an engine can do. What it cannot is refused with `unsupported`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EngineCapabilities {
    /// A running sandbox can be branched.
    pub branch: bool,
    /// A branch can be forked before its files are written.
    pub branch_writes_behind: bool,
    /// A branch can hold only what differs from the snapshot below.
    pub save_layer: bool,
    /// Sandboxes have a network device.
    pub network: bool,
    /// What a client does in a sandbox goes on while it is branched. Otherwise a branch ends calls that are under way
    /// (exec, files, ports): they fail and can be made again.
    pub keeps_connections: bool,
}

/// Answer of `GET /readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Readiness {
    /// Whether every check passed.
    pub ready: bool,
    /// What was checked.
    pub checks: Vec<ReadinessCheck>,
    /// What this node does not do to keep sandboxes apart. It is ready all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_enforced: Vec<NotEnforced>,
    /// How much room there is for more sandboxes. A full node is ready all the same: it serves those it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<NodeRoom>,
}

/// What a node has and what it keeps free. Requests that would go beyond are refused with `busy` or
/// `insufficient_resources`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeRoom {
    /// Sandboxes there are.
    pub sandboxes: u64,
    /// Sandboxes there may be.
    pub sandboxes_max: u64,
    /// Virtual CPUs of all sandboxes.
    pub vcpus: u64,
    /// Virtual CPUs there may be; left out where there is no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus_max: Option<u64>,
    /// Memory that can be used, the reserve included, MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_available_mib: Option<u64>,
    /// Memory left to everything else, MiB.
    pub memory_reserve_mib: u64,
    /// Disk that can be used where snapshots are, the reserve included, MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_available_mib: Option<u64>,
    /// Disk left free, MiB.
    pub disk_reserve_mib: u64,
    /// Why not one more sandbox would be let in; left out where one would.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full: Option<String>,
}

/// Something that a node does not do for its sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NotEnforced {
    /// What: `network`, `limits`, a controller such as `memory`, or a part of the jail.
    pub what: String,
    /// Why, and what would help.
    pub why: String,
}

/// One thing that must hold before sandboxes can be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReadinessCheck {
    /// Its name.
    pub name: String,
    /// Whether it holds.
    pub ok: bool,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Answer of `GET /v1/lineage`: which snapshot came from which sandbox, and the other way round.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Lineage {
    /// Every snapshot.
    pub snapshots: Vec<LineageSnapshot>,
    /// Every sandbox that runs.
    pub sandboxes: Vec<LineageSandbox>,
}

/// A snapshot as a node of the lineage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LineageSnapshot {
    /// Its name.
    pub tag: Tag,
    /// The snapshot whose memory it builds on.
    pub parent_tag: Option<Tag>,
    /// The sandbox it was branched from.
    pub branched_from: Option<String>,
}

/// A sandbox as a node of the lineage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LineageSandbox {
    /// Its id.
    pub id: SandboxId,
    /// The snapshot it was forked from.
    pub snapshot_tag: Tag,
    /// Its state.
    pub state: SandboxState,
}
