//! Workspaces: a sandbox with a name that can be put to sleep and woken.

use serde::{Deserialize, Serialize};

use crate::id::{SandboxId, Tag};

/// Body of `POST /v1/workspaces`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreateWorkspace {
    /// The new workspace's name, at most 55 characters, so that the name of its state fits.
    pub name: Tag,
    /// The snapshot to fork.
    pub snapshot_tag: Tag,
    /// Accepted for older clients. Every sandbox has a network of its own.
    #[serde(default)]
    pub per_child_netns: bool,
    /// Memory limit of the VM process, MiB; also after a resume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 64, maximum = 262144))]
    pub memory_limit_mib: Option<u64>,
}

/// Body of `POST /v1/workspaces/{name}/suspend`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SuspendWorkspace {
    /// Write only what differs from the snapshot below.
    #[serde(default)]
    pub diff: bool,
}

/// The state of a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum WorkspaceState {
    /// Its sandbox runs.
    Running,
    /// Its state is a snapshot; `resume` goes on from there.
    Suspended,
    /// Its sandbox died; `resume` goes on from the last suspend, or from the source.
    Stale,
}

/// A workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkspaceInfo {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: Tag,
    /// The snapshot it was made from.
    pub source_snapshot_tag: Tag,
    /// The snapshot that holds its state.
    pub current_state_tag: Option<Tag>,
    /// Its state.
    pub status: WorkspaceState,
    /// Its sandbox while it runs.
    pub live_sandbox_id: Option<SandboxId>,
    /// When it was made.
    pub created_at_unix: u64,
    /// When it was last made, suspended or resumed.
    pub last_active_unix: u64,
    /// Always null; kept for older clients.
    pub last_branch_memory_path: Option<String>,
}
