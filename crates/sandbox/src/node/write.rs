//! Bringing a branch from memory to disk, as often as it takes.
//!
//! ```text
//!   Writing ──written, published──► Published
//!      │  ▲
//!      │  └── a pause, and there is space again
//!      └─ full disk ─► Failed          its template has died: Failed for good
//! ```
//!
//! While it waits nothing of it is on disk, and its tag is kept by the table of branches in memory.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use forkd_engine::{BranchSpec, LayerFiles};
use forkd_host::sparse;
use forkd_snapshot::{Draft, Files, ManifestDraft, Pin, Snapshot};
use forkd_wire::error::ErrorCode;
use forkd_wire::layer::Index;
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::behind::{Behind, Progress};
use super::{Node, blocking};
use crate::{Error, crash, limits};

/// Where the differing pages wait until all of RAM is put together.
const PARTS: (&str, &str) = ("behind.bin", "behind.idx");

/// The task that writes one branch.
pub(super) struct Writing {
    pub(super) node: Node,
    pub(super) behind: Behind,
    pub(super) about: ManifestDraft,
    /// What is below it, where it is to stand alone.
    pub(super) below: Option<Arc<Pin>>,
    /// Closed when the task is over.
    pub(super) tell: watch::Sender<Progress>,
}

impl Writing {
    /// Writes until it is on disk, given up, or lost.
    pub(super) async fn run(self, draft: Draft) {
        let mut draft = Some(draft);
        let [mut pause, longest] = limits::WRITE_AGAIN;
        while let Some(outcome) = self.attempt(draft.take()).await {
            match outcome {
                Ok(snapshot) => return self.published(&snapshot),
                Err(problem) => self.failed(&problem),
            }
            if !self.behind.loaded.template.is_alive() {
                return;
            }
            if self.unless_given_up(self.wait(&mut pause)).await.is_none() {
                break;
            }
            pause = (pause * 2).min(longest);
            self.tell.send_replace(Progress::Writing);
        }
        self.tell.send_replace(Progress::Removed);
    }

    async fn unless_given_up<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.behind.cancel.cancelled() => None,
            done = work => Some(done),
        }
    }

    /// One attempt, or none if it is given up before the files are there; publishing them is not broken off.
    async fn attempt(&self, begun: Option<Draft>) -> Option<Result<Snapshot, Error>> {
        let writers = &self.node.inner.templates.behind.writers;
        // Never closed, so the turn always comes.
        let _turn = self.unless_given_up(writers.acquire()).await?;
        let written = self.unless_given_up(self.write(begun)).await?;
        crash::point("branch: saved");
        let (draft, layer) = match written {
            Ok(written) => written,
            Err(problem) => return Some(Err(problem)),
        };
        let whole = self.below.clone().map(|below| (below, layer));
        let snapshot = publish(draft, self.about.clone(), whole).await;
        crash::point("branch: published");
        Some(snapshot)
    }

    async fn write(&self, begun: Option<Draft>) -> Result<(Draft, LayerFiles), Error> {
        let draft = match begun {
            Some(draft) => draft,
            None => self.begin_again().await?,
        };
        let spec = spec(&draft, self.below.is_some());
        let layer = spec.files.clone();
        self.behind.loaded.template.write(spec).await?;
        Ok((draft, layer))
    }

    async fn begin_again(&self) -> Result<Draft, Error> {
        let manifest = &self.behind.loaded.manifest;
        let (tag, id) = (manifest.tag.clone(), manifest.id.clone());
        let store = self.node.inner.store.clone();
        Ok(blocking(move || store.begin_again(&tag, id)).await??)
    }

    /// Waits a while, and on until the disk is not full.
    async fn wait(&self, pause: &mut std::time::Duration) {
        loop {
            tokio::time::sleep(*pause).await;
            let store = self.node.inner.store.clone();
            let reserve = self.node.inner.admission.disk_reserve_bytes();
            let room = blocking(move || store.require_free(reserve)).await;
            if matches!(room, Ok(Ok(()))) {
                return;
            }
            *pause = (*pause * 2).min(limits::WRITE_AGAIN[1]);
        }
    }

    fn published(&self, snapshot: &Snapshot) {
        let (tag, templates) = (&self.behind.view.tag, &self.node.inner.templates);
        // Found in one place or the other, at any instant. A template whose forks would share a user goes when
        // those under way are done; the next fork loads the files.
        if self.behind.loaded.template.gives_users() {
            templates.put(Arc::clone(&self.behind.loaded));
        }
        let view = super::images::view(snapshot);
        self.tell.send_replace(Progress::Published(Box::new(view)));
        templates.behind.remove(tag);
        info!(%tag, "branch written");
    }

    fn failed(&self, problem: &Error) {
        let (tag, why) = (&self.behind.view.tag, problem.chain());
        if self.behind.loaded.template.is_alive() {
            warn!(%tag, error = why, "branch not written; it is tried again");
        } else {
            error!(%tag, error = why, "branch not written, and lost");
        }
        self.tell.send_replace(Progress::Failed(why));
    }
}

/// A branch is written as a layer; to stand alone it is put together with what is below it.
fn spec(draft: &Draft, whole: bool) -> BranchSpec {
    let (memory, index) = (draft.memory_path(), draft.index_path());
    let files = match whole {
        false => LayerFiles { memory, index },
        true => LayerFiles {
            memory: memory.with_file_name(PARTS.0),
            index: memory.with_file_name(PARTS.1),
        },
    };
    BranchSpec {
        files,
        state: draft.state_path(),
    }
}

async fn publish(
    draft: Draft,
    about: ManifestDraft,
    whole: Option<(Arc<Pin>, LayerFiles)>,
) -> Result<Snapshot, Error> {
    blocking(move || {
        if let Some((pin, layer)) = whole {
            let memory = draft.memory_path();
            put_together(pin.files(), &layer, &memory).map_err(|e| {
                let text = format!("cannot put {} together", memory.display());
                Error::new(ErrorCode::InsufficientResources, text).with_source(e)
            })?;
        }
        Ok(draft.publish(about)?)
    })
    .await?
}

/// Base and layers, applied. Blocks.
fn put_together(below: &Files, layer: &LayerFiles, to: &Path) -> Result<(), io::Error> {
    let other = |error: &dyn std::error::Error| io::Error::other(forkd_host::chain(error));
    let base = File::open(&below.memory)?;
    let options = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .clone();
    let flat = options.open(to)?;
    sparse::copy(&base, &flat).map_err(|e| other(&e))?;
    let layers = below.layers.iter().map(|l| (&l.memory, &l.index));
    for (memory, index) in layers.chain([(&layer.memory, &layer.index)]) {
        let index = Index::decode(&std::fs::read(index)?).map_err(|e| other(&e))?;
        let pages = File::open(memory)?;
        sparse::apply_layer(&flat, &pages, &index).map_err(|e| other(&e))?;
    }
    Ok(())
}
