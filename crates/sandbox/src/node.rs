//! One node: its snapshots, templates and sandboxes, behind a handle that is cheap to clone.

use std::path::PathBuf;
use std::sync::Arc;

use forkd_engine::Engine;
use forkd_wire::id::{SandboxId, Tag};
use tokio::sync::mpsc;

use crate::Error;
use crate::spec::{BranchRequest, ForkRequest, NodeConfig, RemoveMode, SnapshotRequest};
use crate::view::{
    Close, ForkOutcome, MemoryUse, Recovery, SandboxView, SnapshotOutcome, SnapshotStep,
    SnapshotView,
};

/// A handle on the node.
#[derive(Debug, Clone)]
pub struct Node {}

impl Node {
    /// Opens the store and the records, adopts what runs and sweeps what is orphaned.
    pub async fn open(
        config: NodeConfig,
        engine: Arc<dyn Engine>,
    ) -> Result<(Node, Recovery), Error> {
        let _ = (config, engine);
        todo!()
    }

    /// Boots an image, warms it, freezes it. Steps are told on `steps` as they begin.
    pub async fn create_snapshot(
        &self,
        request: SnapshotRequest,
        steps: Option<mpsc::UnboundedSender<SnapshotStep>>,
    ) -> Result<SnapshotOutcome, Error> {
        let _ = (request, steps);
        todo!()
    }

    /// Every snapshot, by tag, unusable ones included.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotView>, Error> {
        todo!()
    }

    /// One snapshot.
    pub async fn snapshot(&self, tag: &Tag) -> Result<SnapshotView, Error> {
        let _ = tag;
        todo!()
    }

    /// Tags of the snapshots directly above `tag`, and ids of its live sandboxes.
    pub async fn dependents(&self, tag: &Tag) -> Result<(Vec<Tag>, Vec<SandboxId>), Error> {
        let _ = tag;
        todo!()
    }

    /// Removes a snapshot.
    pub async fn remove_snapshot(&self, tag: &Tag, mode: RemoveMode) -> Result<(), Error> {
        let _ = (tag, mode);
        todo!()
    }

    /// Writes a snapshot without layers that equals `tag`.
    pub async fn compact(&self, tag: &Tag, to: &Tag) -> Result<SnapshotView, Error> {
        let _ = (tag, to);
        todo!()
    }

    /// Forks; answers when every fork's agent has answered, or failed.
    pub async fn fork(&self, request: ForkRequest) -> Result<ForkOutcome, Error> {
        let _ = request;
        todo!()
    }

    /// Every sandbox, recently ended ones last.
    pub fn sandboxes(&self) -> Vec<SandboxView> {
        todo!()
    }

    /// One sandbox.
    pub fn sandbox(&self, id: &SandboxId) -> Result<SandboxView, Error> {
        let _ = id;
        todo!()
    }

    /// Kills a sandbox and waits until nothing of it is left. Idempotent while it is remembered.
    pub async fn kill(&self, id: &SandboxId) -> Result<(), Error> {
        let _ = id;
        todo!()
    }

    /// Stops a sandbox's vCPUs.
    pub async fn pause(&self, id: &SandboxId) -> Result<(), Error> {
        let _ = id;
        todo!()
    }

    /// Lets a paused sandbox go on.
    pub async fn resume(&self, id: &SandboxId) -> Result<(), Error> {
        let _ = id;
        todo!()
    }

    /// Freezes a running sandbox into a new snapshot while it goes on.
    pub async fn branch(&self, request: BranchRequest) -> Result<SnapshotView, Error> {
        let _ = request;
        todo!()
    }

    /// The guest's agent: processes, files, eval, ports.
    pub fn guest(&self, id: &SandboxId) -> Result<crate::guest::Client, Error> {
        let _ = id;
        todo!()
    }

    /// The file the guest's console goes to.
    pub fn console(&self, id: &SandboxId) -> Result<PathBuf, Error> {
        let _ = id;
        todo!()
    }

    /// Memory of a sandbox's VM process.
    pub async fn memory(&self, id: &SandboxId) -> Result<MemoryUse, Error> {
        let _ = id;
        todo!()
    }

    /// The engine's name.
    pub fn engine(&self) -> &'static str {
        todo!()
    }

    /// Ends the node. Nothing of it is left with [`Close::KillAll`].
    pub async fn close(&self, how: Close) -> Vec<Error> {
        let _ = how;
        todo!()
    }
}
