//! Workspaces: a sandbox with a name, put to sleep as a snapshot and woken as a fork of it.
//!
//! A workspace is made of the node's own verbs, and its record is the truth: what a sandbox or a state has to do
//! with a workspace that its record does not tell is what a crash has left, and is cleared away when the daemon
//! starts ([`Workspaces::reconcile`]). A suspend removes the old state only when the new one is there, so that
//! no failure loses what was suspended last. One operation at a time is done on a workspace.
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

use forkd_sandbox::spec::{BranchRequest, ForkRequest, RemoveMode};
use forkd_sandbox::view::SandboxStatus;
use forkd_sandbox::{Node, crash};
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

/// Metadata of a workspace's sandboxes: its name.
const METADATA: &str = "forkd.workspace";

/// Places at which a test kills the daemon; see [`forkd_sandbox::crash`].
pub(crate) const CRASH_PLACES: [&str; 8] = [
    "workspace: forked",
    "workspace: recorded",
    "workspace: suspend recorded",
    "workspace: frozen",
    "workspace: asleep",
    "workspace: sandbox gone",
    "workspace: killed",
    "workspace: state removed",
];

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
        let fork = fork_of(
            &request.name,
            &request.snapshot_tag,
            request.memory_limit_mib,
        );
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
            removing: false,
            sandbox: Some(sandbox.clone()),
            created_at_unix: now,
            last_active_unix: now,
        };
        if let Err(error) = self.store.put(record.clone()).await {
            self.let_go(&sandbox).await;
            return Err(error);
        }
        crash::point("workspace: recorded");
        Ok(self.info(record))
    }

    /// Freezes a workspace's sandbox into its state, and ends the sandbox.
    pub(crate) async fn suspend(&self, name: &Tag, diff: bool) -> Result<WorkspaceInfo, ApiError> {
        let _alone = self.alone(name).await;
        let mut record = self.record(name).await?;
        let Some(sandbox) = record.sandbox.clone().filter(|id| self.runs(id)) else {
            return Err(refused(format!("workspace {name} does not run")));
        };
        let state = self.next_state(&mut record).await?;
        let old = record.state.take();
        let branch = BranchRequest {
            id: sandbox.clone(),
            tag: Some(state.clone()),
            full: !diff,
            wait: true,
        };
        self.node.branch(branch).await?;
        crash::point("workspace: frozen");
        record.state = Some(state.clone());
        record.suspended = true;
        record.sandbox = None;
        record.last_active_unix = now_unix();
        if let Err(error) = self.store.put(record.clone()).await {
            // Not recorded, so it did not happen: the sandbox goes on.
            self.remove_state(&state).await;
            return Err(error);
        }
        crash::point("workspace: asleep");
        self.let_go(&sandbox).await;
        crash::point("workspace: sandbox gone");
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
        let fork = fork_of(name, &from, record.memory_limit_mib);
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
        let mut record = self.record(name).await?;
        record.removing = true;
        self.store.put(record.clone()).await?;
        self.finish_removal(record).await
    }

    async fn finish_removal(&self, record: Record) -> Result<(), ApiError> {
        if let Some(sandbox) = record.sandbox.filter(|id| self.runs(id)) {
            self.node.kill(&sandbox).await?;
        }
        crash::point("workspace: killed");
        if let Some(state) = record.state {
            match self.node.remove_snapshot(&state, RemoveMode::Force).await {
                Err(error) if error.code() != ErrorCode::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        crash::point("workspace: state removed");
        self.store.remove(&record.name).await
    }

    /// Clears away what a daemon that was killed has left: sandboxes and states that were made for a workspace
    /// whose record does not have them.
    pub(crate) async fn reconcile(&self) -> Result<(), ApiError> {
        let records = self.store.all().await?;
        let recorded = |name: &str| records.iter().find(|record| record.name.as_str() == name);
        for view in self.node.sandboxes() {
            let Some(name) = view.metadata.get(METADATA) else {
                continue;
            };
            let wanted = recorded(name).is_some_and(|r| r.sandbox.as_ref() == Some(&view.id));
            if !wanted && view.status != SandboxStatus::Ended {
                tracing::info!(id = %view.id, workspace = name, "half made sandbox removed");
                self.let_go(&view.id).await;
            }
        }
        let there = self.node.snapshots().await?;
        for record in &records {
            let of_it =
                (1..=record.suspends).filter_map(|number| state_tag(&record.name, number).ok());
            for state in of_it.filter(|state| record.state.as_ref() != Some(state)) {
                if there.iter().any(|snapshot| snapshot.tag == state) {
                    tracing::info!(%state, workspace = %record.name, "half made state removed");
                    self.remove_state(&state).await;
                }
            }
        }
        for record in records.into_iter().filter(|record| record.removing) {
            self.finish_removal(record).await?;
        }
        Ok(())
    }

    /// The tag of a state that is about to be made, free and recorded as ours.
    async fn next_state(&self, record: &mut Record) -> Result<Tag, ApiError> {
        let there = self.node.snapshots().await?;
        let tag = state_tag(&record.name, record.suspends + 1)?;
        if there.iter().any(|snapshot| snapshot.tag == tag) {
            // Somebody else's snapshot of that name stays, and must never be taken for ours.
            let text = format!("there is a snapshot {tag} that is not of this workspace");
            return Err(ApiError::new(ErrorCode::AlreadyExists, text)
                .remedy("remove it, or give the workspace another name"));
        }
        record.suspends += 1;
        self.store.put(record.clone()).await?;
        crash::point("workspace: suspend recorded");
        Ok(tag)
    }

    async fn record(&self, name: &Tag) -> Result<Record, ApiError> {
        let found = self.store.find(name).await?;
        found.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("there is no workspace {name}"))
        })
    }

    async fn fork(&self, request: ForkRequest) -> Result<SandboxId, ApiError> {
        let outcome = self.node.fork(request).await?;
        crash::point("workspace: forked");
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

/// A fork that tells which workspace it is for.
fn fork_of(name: &Tag, from: &Tag, memory_limit_mib: Option<u64>) -> ForkRequest {
    let mut fork = ForkRequest::new(from.clone(), 1);
    fork.memory_limit_mib = memory_limit_mib;
    fork.metadata = [(METADATA.to_owned(), name.to_string())].into();
    fork
}

fn state_tag(name: &Tag, number: u64) -> Result<Tag, ApiError> {
    Tag::new(format!("ws-{name}-state-{number}"))
        .map_err(|error| ApiError::invalid(error.to_string()))
}

/// A workspace in the wrong state; older clients expect 400.
fn refused(text: String) -> ApiError {
    ApiError::new(ErrorCode::NotReady, text).status(StatusCode::BAD_REQUEST)
}

fn now_unix() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
