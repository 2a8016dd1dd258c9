//! Snapshots.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::id::Tag;

/// Body of `POST /v1/snapshots`. Either `image` or `kernel` and `rootfs` say what to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreateSnapshot {
    /// The new snapshot's name.
    pub tag: Tag,
    /// Name of an image in the node's image store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Path of a Linux kernel on the node. Paths need the admin scope.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub kernel: Option<PathBuf>,
    /// Path of an initial RAM file system on the node, with the agent as `/init`. Without it that of an image on the
    /// node with the same kernel is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub initramfs: Option<PathBuf>,
    /// Path of a root file system on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub rootfs: Option<PathBuf>,
    /// RAM in MiB.
    #[serde(default = "default_memory_mib")]
    #[cfg_attr(feature = "openapi", schema(minimum = 64, maximum = 262144))]
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    #[serde(default = "default_vcpus")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 32))]
    pub vcpus: u32,
    /// Python code to run before the freeze, in the interpreter that the forks inherit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// Shell command that must succeed before the freeze. Not together with `warm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_cmd: Option<String>,
    /// The caller's own words about the snapshot, kept in its manifest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Longest time the guest may take to answer after boot, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 3600))]
    pub boot_timeout_secs: Option<u64>,
    /// Accepted for older clients. The root is always read-only below an overlay of the sandbox's own.
    #[serde(default)]
    pub rw: bool,
    /// Accepted for older clients. Network devices are the daemon's business.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Accepted for older clients, at most 60. The daemon waits for the agent's answer, not for a while.
    #[serde(default = "default_boot_wait_secs")]
    #[cfg_attr(feature = "openapi", schema(maximum = 60))]
    pub boot_wait_secs: u64,
}

impl CreateSnapshot {
    /// A request to boot the image `image`, with the defaults for everything else.
    pub fn of_image(tag: Tag, image: impl Into<String>) -> Self {
        Self {
            tag,
            image: Some(image.into()),
            kernel: None,
            initramfs: None,
            rootfs: None,
            memory_mib: default_memory_mib(),
            vcpus: default_vcpus(),
            warm: None,
            warm_cmd: None,
            labels: BTreeMap::new(),
            boot_timeout_secs: None,
            rw: false,
            tap: None,
            boot_wait_secs: default_boot_wait_secs(),
        }
    }
}

fn default_memory_mib() -> u64 {
    512
}

fn default_vcpus() -> u32 {
    1
}

fn default_boot_wait_secs() -> u64 {
    10
}

/// The state of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum SnapshotState {
    /// Its files are being written.
    Writing,
    /// It is on disk and can be forked.
    Ready,
    /// It cannot be used, or is a branch in memory that could not be written; `warning` says why.
    Failed,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotInfo {
    /// Its name.
    pub tag: Tag,
    /// Where its files are on the node.
    pub dir: String,
    /// When it was made.
    pub created_at_unix: u64,
    /// How it stands on disk. A branch may be forked before it is ready: see `bootable`.
    pub status: SnapshotState,
    /// Whether sandboxes can be forked from it.
    pub bootable: bool,
    /// The sandbox it was branched from, or `compact:TAG`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branched_from: Option<String>,
    /// How long the guest stood still when it was branched, rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<u64>,
    /// The same in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// Milliseconds from the request until the layer was written. In the answer to a branch that was asked for as a
    /// diff and waited for, and nowhere else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_ms: Option<u64>,
    /// Bytes the layer takes on disk, for a snapshot that holds only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_physical_bytes: Option<u64>,
    /// Bytes of guest memory the layer stands for, for a snapshot that holds only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_logical_bytes: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Unique over all snapshots ever made.
    #[serde(default)]
    pub id: String,
    /// The engine that made it.
    #[serde(default)]
    pub engine: String,
    /// The image it was booted from.
    #[serde(default)]
    pub image: String,
    /// That image's identity.
    #[serde(default)]
    pub image_digest: String,
    /// What was run in it before the freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// What its maker wanted to find again; the node adds how long the making took.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// RAM in MiB.
    #[serde(default)]
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    #[serde(default)]
    pub vcpus: u32,
    /// The snapshot below, if it is a branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_tag: Option<Tag>,
    /// Whether it holds only what differs from its parent.
    #[serde(default)]
    pub layered: bool,
    /// Bytes its files take on disk.
    #[serde(default)]
    pub physical_bytes: u64,
    /// How long the stages of making it took. Only in the answer to the request that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stages: Option<SnapshotStages>,
}

/// How long the stages of making a snapshot took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotStages {
    /// From the start of the VM to the agent's first answer.
    pub boot_ms: f64,
    /// The warm-up.
    pub warm_ms: f64,
    /// From the freeze to the published snapshot.
    pub save_ms: f64,
}

/// Answer of `GET /v1/snapshots/{tag}/info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotInfoDetail {
    /// Its name.
    pub tag: Tag,
    /// Where its files are on the node.
    pub dir: String,
    /// When it was made.
    pub created_at_unix: Option<u64>,
    /// Bytes of memory the guest sees.
    pub memory_logical_bytes: u64,
    /// Bytes its memory takes on disk.
    pub memory_physical_bytes: u64,
    /// Bytes of device and CPU state.
    pub vmstate_bytes: u64,
    /// The snapshot below.
    pub parent_tag: Option<Tag>,
    /// The unique id of the snapshot below, to which this one is bound.
    pub parent_content_hash: Option<String>,
    /// Links to the base; 0 for a base.
    pub chain_depth: u32,
    /// Tags of the snapshots directly above it.
    pub dependents: Vec<Tag>,
    /// Tags of the snapshots below it, base first.
    pub ancestors: Vec<Tag>,
    /// Sandboxes that run on it.
    #[serde(default)]
    pub sandboxes: Vec<crate::id::SandboxId>,
    /// Everything else that is known about it.
    pub snapshot: SnapshotInfo,
}

/// Body of `POST /v1/snapshots/{tag}/compact`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CompactSnapshot {
    /// The name of the snapshot without layers.
    pub to: Tag,
}

/// A step of making a snapshot: the event `step` of a streamed `POST /v1/snapshots`. The stream ends with
/// an event `result` that carries [`SnapshotInfo`], or `error` with [`super::error::ErrorBody`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotStepEvent {
    /// The step that begins.
    pub step: SnapshotStep,
    /// Milliseconds since the request.
    pub elapsed_ms: f64,
}

/// The steps of making a snapshot, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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
