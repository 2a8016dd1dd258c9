//! Workspaces: a sandbox with a name, put to sleep as a snapshot and woken as a fork of it.
//!
//! A workspace is made of the node's own verbs. Its record is written before and after each of them, and a
//! suspend removes the old state only when the new one is there, so that no failure loses what was
//! suspended last. One operation at a time is done on a workspace.
//!
//! ```text
//!   create ─► running ── suspend: branch, record, kill ──► suspended
//!               ▲ │ sandbox died: stale                        │
//!               └─┴──────────── resume: fork, record ◄─────────┘
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use forkd_sandbox::Node;
use forkd_sandbox::spec::{BranchRequest, ForkRequest, RemoveMode};
use forkd_sandbox::view::SandboxStatus;
use forkd_wire::api::workspace::{CreateWorkspace, WorkspaceInfo, WorkspaceState};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::{SandboxId, Tag};
use http::StatusCode;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::ApiError;

mod store;

use store::{Record, Store};

/// Longest name: with `ws-`, `-state` and a counter it must still be a tag.
const NAME_LEN_MAX: usize = 48;

/// All workspaces of a node.
#[derive(Debug, Clone)]
pub(crate) struct Workspaces {
    node: Node,
    store: Arc<Store>,
    busy: Arc<std::sync::Mutex<BTreeMap<Tag, Arc<Mutex<()>>>>>,
}

impl Workspaces {
    /// The workspaces recorded in a file. It is read when it is first needed.
    pub(crate) fn new(node: Node, file: PathBuf) -> Self {
        Self {
            node,
            store: Arc::new(Store::new(file)),
            busy: Arc::default(),
        }
    }

    /// Every workspace, by name.
    pub(crate) async fn list(&self) -> Result<Vec<WorkspaceInfo>, ApiError> {
        let records = self.store.all().await?;
        Ok(records
            .into_iter()
            .map(|record| self.info(record))
            .collect())
    }

    /// One workspace.
    pub(crate) async fn get(&self, name: &Tag) -> Result<WorkspaceInfo, ApiError> {
        Ok(self.info(self.record(name).await?))
    }

    /// Forks the source into a new workspace.
    pub(crate) async fn create(&self, request: CreateWorkspace) -> Result<WorkspaceInfo, ApiError> {
        if request.name.as_str().len() > NAME_LEN_MAX {
            return Err(ApiError::invalid(format!(
                "the name {} has {} characters, at most {NAME_LEN_MAX} are allowed",
                request.name,
                request.name.as_str().len()
            )));
        }
        let _alone = self.alone(&request.name).await;
        if self.store.find(&request.name).await?.is_some() {
            let text = format!("there is a workspace {} already", request.name);
            return Err(ApiError::new(ErrorCode::AlreadyExists, text));
        }
        let mut fork = ForkRequest::new(request.snapshot_tag.clone(), 1);
        fork.memory_limit_mib = request.memory_limit_mib;
        fork.validate()?;
        let now = now_unix();
        let sandbox = self.fork(fork).await?;
        let record = Record {
            id: format!(
                "ws-{}",
                sandbox.as_str().chars().take(16).collect::<String>()
            ),
            name: request.name,
            source: request.snapshot_tag,
            memory_limit_mib: request.memory_limit_mib,
            state: None,
            suspended: false,
            suspends: 0,
            sandbox: Some(sandbox.clone()),
            created_at_unix: now,
            last_active_unix: now,
        };
        if let Err(error) = self.store.put(record.clone()).await {
            self.let_go(&sandbox).await;
            return Err(error);
        }
        Ok(self.info(record))
    }

    /// Freezes a workspace's sandbox into its state, and ends the sandbox.
    pub(crate) async fn suspend(&self, name: &Tag, diff: bool) -> Result<WorkspaceInfo, ApiError> {
        let _alone = self.alone(name).await;
        let mut record = self.record(name).await?;
        let Some(sandbox) = record.sandbox.clone().filter(|id| self.runs(id)) else {
            return Err(refused(format!("workspace {name} does not run")));
        };
        let old = record.state.take();
        record.suspends += 1;
        let state = Tag::new(format!("ws-{name}-state-{}", record.suspends));
        let state = state.map_err(|error| ApiError::invalid(error.to_string()))?;
        let branch = BranchRequest {
            id: sandbox.clone(),
            tag: Some(state.clone()),
            full: !diff,
            wait: true,
        };
        self.node.branch(branch).await?;
        record.state = Some(state.clone());
        record.suspended = true;
        record.sandbox = None;
        record.last_active_unix = now_unix();
        if let Err(error) = self.store.put(record.clone()).await {
            // Not recorded, so it did not happen: the sandbox goes on.
            self.remove_state(&state).await;
            return Err(error);
        }
        self.let_go(&sandbox).await;
        if let Some(old) = old {
            self.remove_state(&old).await;
        }
        Ok(self.info(record))
    }

    /// Forks a workspace's state, or its source if it was never suspended.
    pub(crate) async fn resume(&self, name: &Tag) -> Result<WorkspaceInfo, ApiError> {
        let _alone = self.alone(name).await;
        let mut record = self.record(name).await?;
        if record.sandbox.as_ref().is_some_and(|id| self.runs(id)) {
            return Err(refused(format!("workspace {name} runs already")));
        }
        let from = record
            .state
            .clone()
            .unwrap_or_else(|| record.source.clone());
        let mut fork = ForkRequest::new(from, 1);
        fork.memory_limit_mib = record.memory_limit_mib;
        let sandbox = self.fork(fork).await?;
        record.sandbox = Some(sandbox.clone());
        record.suspended = false;
        record.last_active_unix = now_unix();
        if let Err(error) = self.store.put(record.clone()).await {
            self.let_go(&sandbox).await;
            return Err(error);
        }
        Ok(self.info(record))
    }

    /// Ends a workspace: its sandbox and its state go, its source stays.
    pub(crate) async fn remove(&self, name: &Tag) -> Result<(), ApiError> {
        let _alone = self.alone(name).await;
        let record = self.record(name).await?;
        if let Some(sandbox) = record.sandbox.filter(|id| self.runs(id)) {
            self.node.kill(&sandbox).await?;
        }
        if let Some(state) = record.state {
            match self.node.remove_snapshot(&state, RemoveMode::Force).await {
                Err(error) if error.code() != ErrorCode::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        self.store.remove(name).await
    }

    async fn record(&self, name: &Tag) -> Result<Record, ApiError> {
        let found = self.store.find(name).await?;
        found.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("there is no workspace {name}"))
        })
    }

    async fn fork(&self, request: ForkRequest) -> Result<SandboxId, ApiError> {
        let outcome = self.node.fork(request).await?;
        match outcome.children.into_iter().next() {
            Some(child) => Ok(child?.id),
            None => Err(ApiError::new(
                ErrorCode::Internal,
                "the fork made no sandbox",
            )),
        }
    }

    fn runs(&self, id: &SandboxId) -> bool {
        use SandboxStatus::{Paused, Running, Starting};
        let view = self.node.sandbox(id);
        view.is_ok_and(|view| matches!(view.status, Starting | Running | Paused))
    }

    async fn let_go(&self, sandbox: &SandboxId) {
        if let Err(error) = self.node.kill(sandbox).await {
            tracing::error!(%sandbox, error = error.chain(), "a workspace's sandbox is left behind");
        }
    }

    async fn remove_state(&self, state: &Tag) {
        // What was branched from it lives on without its name.
        if let Err(error) = self.node.remove_snapshot(state, RemoveMode::Force).await {
            tracing::warn!(%state, error = error.chain(), "a workspace's old state is left behind");
        }
    }

    async fn alone(&self, name: &Tag) -> OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self
                .busy
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            // Names nobody waits for any more are dropped, so that the map stays small.
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(busy.entry(name.clone()).or_default())
        };
        lock.lock_owned().await
    }

    fn info(&self, record: Record) -> WorkspaceInfo {
        let live = record.sandbox.filter(|id| self.runs(id));
        let status = match (&live, &record.state, record.suspended) {
            (Some(_), ..) => WorkspaceState::Running,
            (None, Some(_), true) => WorkspaceState::Suspended,
            (None, ..) => WorkspaceState::Stale,
        };
        WorkspaceInfo {
            id: record.id,
            name: record.name,
            source_snapshot_tag: record.source,
            current_state_tag: record.state,
            status,
            live_sandbox_id: live,
            created_at_unix: record.created_at_unix,
            last_active_unix: record.last_active_unix,
            last_branch_memory_path: None,
        }
    }
}

/// A workspace in the wrong state; older clients expect 400.
fn refused(text: String) -> ApiError {
    ApiError::new(ErrorCode::NotReady, text).status(StatusCode::BAD_REQUEST)
}

fn now_unix() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
