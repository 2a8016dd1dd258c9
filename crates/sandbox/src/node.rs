//! One node: its snapshots, templates and sandboxes, behind a handle that is cheap to clone.
//!
//! The verbs are grouped in files of their own: [`build`] boots and freezes, [`fork`] forks, [`branch`] freezes what
//! runs, [`images`] lists and removes snapshots, [`recover`] takes over what an earlier daemon left, [`requests`] remembers what
//! was answered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_engine::{Capabilities, Enforcement, Engine};
use forkd_host::file::LockFile;
use forkd_slot::policy::Policy;
use forkd_snapshot::Store;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::actor::{Context, Handle, Request};
use crate::admission::{Ledger, Room};
use crate::place::Missing;
use crate::spec::NodeConfig;
use crate::view::{Close, Ending, MemoryUse, SandboxStatus, SandboxView};
use crate::{Error, guest, limits};

mod behind;
mod branch;
mod build;
mod fork;
mod images;
mod recover;
mod requests;
mod templates;
mod write;

use templates::Templates;

/// A handle on the node.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: NodeConfig,
    engine: Arc<dyn Engine>,
    store: Store,
    context: Arc<Context>,
    sandboxes: Mutex<BTreeMap<SandboxId, Handle>>,
    templates: Templates,
    admission: Arc<Ledger>,
    /// Every task that owns a resource: closing waits for them.
    tasks: TaskTracker,
    closing: CancellationToken,
    _lock: LockFile,
}

impl Node {
    /// Every sandbox, recently ended ones last.
    pub fn sandboxes(&self) -> Vec<SandboxView> {
        let mut views: Vec<SandboxView> = self.lock().values().map(Handle::view).collect();
        views.sort_by_key(|v| (v.status == SandboxStatus::Ended, v.created_at_unix, v.index));
        views
    }

    /// One sandbox.
    pub fn sandbox(&self, id: &SandboxId) -> Result<SandboxView, Error> {
        Ok(self.handle(id)?.view())
    }

    /// Kills a sandbox and waits until nothing of it is left. Idempotent while it is remembered.
    pub async fn kill(&self, id: &SandboxId) -> Result<(), Error> {
        self.kill_because(id, Ending::Killed, "killed on request")
            .await
    }

    async fn kill_because(&self, id: &SandboxId, ending: Ending, why: &str) -> Result<(), Error> {
        let handle = self.handle(id)?;
        handle.stop(ending, why);
        handle.ended().await;
        self.forget_old();
        Ok(())
    }

    /// Stops a sandbox's vCPUs.
    pub async fn pause(&self, id: &SandboxId) -> Result<(), Error> {
        self.handle(id)?.ask(id, Request::Pause).await
    }

    /// Lets a paused sandbox go on.
    pub async fn resume(&self, id: &SandboxId) -> Result<(), Error> {
        self.handle(id)?.ask(id, Request::Resume).await
    }

    /// The guest's agent: processes, files, eval, ports.
    pub fn guest(&self, id: &SandboxId) -> Result<guest::Client, Error> {
        let handle = self.handle(id)?;
        let view = handle.view();
        let refused = match view.status {
            SandboxStatus::Running => None,
            SandboxStatus::Starting => Some(("is not ready yet", "try again in a moment")),
            SandboxStatus::Paused => Some(("is paused", "resume it first")),
            SandboxStatus::Stopping | SandboxStatus::Ended => {
                let why = view.ended.unwrap_or_default();
                let text = format!("sandbox {id} has ended: {why}");
                return Err(Error::new(ErrorCode::NotReady, text));
            }
        };
        match (refused, handle.vm()) {
            (None, Some((_, client))) => Ok(client.clone()),
            (Some((text, remedy)), _) => {
                let error = Error::new(ErrorCode::NotReady, format!("sandbox {id} {text}"));
                Err(error.with_remedy(remedy))
            }
            (None, None) => Err(Error::new(
                ErrorCode::Internal,
                format!("sandbox {id} has no VM"),
            )),
        }
    }

    /// The file the guest's console goes to.
    pub fn console(&self, id: &SandboxId) -> Result<PathBuf, Error> {
        match self.handle(id)?.vm() {
            Some((vm, _)) => Ok(vm.console()),
            None => Err(Error::new(
                ErrorCode::NotReady,
                format!("sandbox {id} has no console yet"),
            )),
        }
    }

    /// Memory of a sandbox's VM process.
    pub async fn memory(&self, id: &SandboxId) -> Result<MemoryUse, Error> {
        let gone = || Error::new(ErrorCode::NotReady, format!("sandbox {id} has no process"));
        let pid = self.handle(id)?.view().pid.ok_or_else(gone)?;
        let used = blocking(move || forkd_host::process::memory(pid))
            .await?
            .map_err(|e| {
                Error::new(ErrorCode::NotReady, format!("cannot measure sandbox {id}"))
                    .with_source(e)
            })?;
        Ok(MemoryUse {
            pss_kib: used.pss_kib,
            private_kib: used.private_kib,
        })
    }

    /// The engine's name.
    pub fn engine(&self) -> &'static str {
        self.inner.engine.name()
    }

    /// What the engine can do.
    pub fn capabilities(&self) -> Capabilities {
        self.inner.engine.capabilities()
    }

    /// Ends the node. Nothing of it is left with [`Close::KillAll`]. Other handles answer
    /// [`ErrorCode::ShuttingDown`] from now on.
    pub async fn close(&self, how: Close) {
        self.inner.closing.cancel();
        if how == Close::KillAll {
            let handles: Vec<Handle> = self.lock().values().cloned().collect();
            handles
                .iter()
                .for_each(|handle| handle.stop(Ending::Closed, "the daemon is closing"));
            for handle in handles {
                handle.ended().await;
            }
        }
        self.settle_branches().await;
        self.inner.templates.close_all().await;
        self.inner.tasks.close();
        if how == Close::KillAll {
            self.inner.tasks.wait().await;
        }
        let places = Arc::clone(&self.inner.context.places);
        // A failure to run it has nothing to close.
        let _ = blocking(move || places.close()).await;
    }

    /// What this host does not do to keep sandboxes apart. The first call may take a while.
    pub async fn missing(&self) -> Vec<Missing> {
        let mut missing = self.inner.context.places.missing();
        for (what, enforcement) in self.inner.engine.enforcement().await {
            if let Enforcement::NotEnforced { why } = enforcement {
                let what = what.to_owned();
                missing.push(Missing { what, why });
            }
        }
        missing
    }

    /// How much room there is for more.
    pub fn room(&self) -> Room {
        self.inner.admission.room(self.load())
    }

    /// Sandboxes that have not ended, and their virtual CPUs.
    fn load(&self) -> (u64, u64) {
        let sandboxes = self.lock();
        let loads = sandboxes.values().filter_map(Handle::vcpus);
        loads.fold((0, 0), |(count, vcpus), more| {
            (count + 1, vcpus + u64::from(more))
        })
    }

    /// Changes what a running sandbox may reach.
    pub async fn set_network(&self, id: &SandboxId, policy: Policy) -> Result<SandboxView, Error> {
        let handle = self.handle(id)?;
        handle
            .ask(id, |reply| Request::Network(policy, reply))
            .await?;
        Ok(handle.view())
    }

    fn handle(&self, id: &SandboxId) -> Result<Handle, Error> {
        self.lock().get(id).cloned().ok_or_else(|| {
            Error::new(ErrorCode::NotFound, format!("there is no sandbox {id}"))
                .with_remedy("`forkd ls` lists those there are")
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Handle>> {
        // A panic while the map is locked cannot leave it half changed: every use is one operation.
        self.inner
            .sandboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the memory of ended sandboxes bounded.
    fn forget_old(&self) {
        let mut sandboxes = self.lock();
        let ended = |handle: &Handle| handle.status() == SandboxStatus::Ended;
        let mut ended: Vec<(u64, SandboxId)> = sandboxes
            .iter()
            .filter(|(_, handle)| ended(handle))
            .map(|(id, handle)| (handle.view().created_at_unix, id.clone()))
            .collect();
        ended.sort_unstable();
        let excess = ended.len().saturating_sub(limits::ENDED_KEPT);
        for (_, id) in &ended[..excess] {
            sandboxes.remove(id);
        }
    }

    fn refuse_when_closing(&self) -> Result<(), Error> {
        if self.inner.closing.is_cancelled() {
            return Err(Error::new(
                ErrorCode::ShuttingDown,
                "the daemon is shutting down",
            ));
        }
        Ok(())
    }

    /// Runs work in a task of its own that cleans up after itself: when the caller goes away, or the node
    /// closes, the work is told through its token, and nothing is left half done.
    async fn guarded<T, F>(
        &self,
        work: impl FnOnce(Node, CancellationToken) -> F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        self.refuse_when_closing()?;
        let cancelled = self.inner.closing.child_token();
        let _told_on_drop = cancelled.clone().drop_guard();
        let task = self
            .inner
            .tasks
            .spawn(work(self.clone(), cancelled.clone()));
        task.await.unwrap_or_else(|e| {
            Err(Error::new(ErrorCode::Internal, "a task failed").with_source(e))
        })
    }
}

fn cancelled_error() -> Error {
    Error::new(
        ErrorCode::ShuttingDown,
        "interrupted; what was begun has been undone",
    )
}

/// Runs blocking work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::new(ErrorCode::Internal, "a blocking task failed").with_source(e))
}

fn now_unix() -> u64 {
    use std::time::{SystemTime, UNIX_EPOCH};
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
