//! Branching: a running sandbox becomes a snapshot and goes on running.
//!
//! An engine that can fork a branch before its files are written makes it a snapshot in memory at once
//! ([`behind`](super::behind)); the others are asked to save, and the snapshot is there when it is on disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use forkd_engine::{LayerFiles, SaveMemory, SaveSpec};
use forkd_snapshot::{
    Draft, Lineage, Manifest, ManifestDraft, Memory, MemoryDraft, Pin, SCHEMA_VERSION, Snapshot,
    SnapshotRef,
};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::Tag;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::behind::{Behind, Progress};
use super::templates::Loaded;
use super::write::Writing;
use super::{Node, blocking, cancelled_error, now_unix, templates};
use crate::actor::Request;
use crate::spec::BranchRequest;
use crate::view::{SnapshotStatus, SnapshotView};
use crate::{Error, crash, ids, limits};

impl Node {
    /// Freezes a running sandbox into a new snapshot while it goes on.
    pub async fn branch(&self, request: BranchRequest) -> Result<SnapshotView, Error> {
        let capabilities = self.inner.engine.capabilities();
        if !capabilities.branch {
            let text = format!(
                "the {} engine cannot branch a running sandbox",
                self.engine()
            );
            return Err(Error::new(ErrorCode::Unsupported, text));
        }
        self.guarded(|node, cancelled| async move {
            if capabilities.branch_writes_behind {
                return node.freeze_in_memory(request, cancelled).await;
            }
            tokio::select! {
                branched = node.freeze(request) => branched,
                () = cancelled.cancelled() => Err(cancelled_error()),
            }
        })
        .await
    }

    /// The snapshot is there when its files are.
    async fn freeze(&self, request: BranchRequest) -> Result<SnapshotView, Error> {
        let handle = self.handle(&request.id)?;
        let source = handle.view();
        let tag = tag_of(&request)?;
        let parent = self.parent_manifest(&source.tag).await?;
        let layer = !request.full && self.inner.engine.capabilities().save_layer;
        let reserve = self.inner.admission.disk_reserve_bytes();
        let bytes = parent.machine.memory_mib * 1024 * 1024 + reserve;
        let draft = self.branch_draft(&tag, bytes).await?;
        crash::point("branch: draft begun");
        let spec = save_spec(&draft, layer);
        let saved = handle
            .ask(&request.id, |reply| Request::Save(spec, reply))
            .await?;
        crash::point("branch: saved");
        let memory = match layer {
            true => MemoryDraft::Layer {
                over: parent.reference(),
            },
            false => MemoryDraft::Full,
        };
        let facts = self.inner.engine.compatibility().await?;
        let about = about(&parent, memory, &request, saved.pause, facts);
        let snapshot = blocking(move || draft.publish(about)).await??;
        crash::point("branch: published");
        let mut view = super::images::view(&snapshot);
        view.pause = Some(saved.pause);
        Ok(view)
    }

    async fn parent_manifest(&self, tag: &Tag) -> Result<Manifest, Error> {
        if let Some(behind) = self.inner.templates.behind.get(tag) {
            return Ok(behind.loaded.manifest.clone());
        }
        let (store, tag) = (self.inner.store.clone(), tag.clone());
        Ok(blocking(move || store.get(&tag)).await??.manifest)
    }

    async fn branch_draft(&self, tag: &Tag, bytes: u64) -> Result<Draft, Error> {
        self.inner.templates.behind.refuse_taken(tag)?;
        let (store, tag) = (self.inner.store.clone(), tag.clone());
        Ok(blocking(move || {
            let draft = store.begin(&tag)?;
            store.require_free(bytes)?;
            Ok::<_, forkd_snapshot::Error>(draft)
        })
        .await??)
    }

    /// The snapshot is there at once, and waited for if that is wanted.
    async fn freeze_in_memory(
        &self,
        request: BranchRequest,
        cancelled: CancellationToken,
    ) -> Result<SnapshotView, Error> {
        let wait = request.wait;
        let behind = self.branch_off(request).await?;
        if !wait {
            return Ok(behind.view());
        }
        let tag = behind.view.tag.clone();
        let settled = tokio::select! {
            settled = behind.settled() => settled,
            () = cancelled.cancelled() => {
                // At the end of the daemon the writing is finished; a caller who went away does not know
                // the name.
                if self.inner.closing.is_cancelled() {
                    let text = format!("the daemon is closing; snapshot {tag} is being finished");
                    return Err(Error::new(ErrorCode::ShuttingDown, text));
                }
                if let Some(behind) = self.inner.templates.behind.remove(&tag) {
                    behind.give_up().await;
                }
                return Err(cancelled_error());
            }
        };
        match settled {
            Progress::Failed(why) => Err(Error::new(
                ErrorCode::InsufficientResources,
                format!("snapshot {tag} is in memory only, it could not be written: {why}"),
            )
            .with_remedy(format!(
                "it can be forked until the daemon ends, and is written once there is space: free some, or \
                 remove it with `forkd rmi {tag}`"
            ))),
            Progress::Removed => Err(Error::new(
                ErrorCode::NotFound,
                format!("snapshot {tag} was removed while it was written"),
            )),
            Progress::Writing | Progress::Published(_) => Ok(behind.view()),
        }
    }

    /// Makes the branch and begins to write it.
    async fn branch_off(&self, request: BranchRequest) -> Result<Behind, Error> {
        let handle = self.handle(&request.id)?;
        let source = handle.view();
        let tag = tag_of(&request)?;
        let parent = self.parent_manifest(&source.tag).await?;
        let facts = self.inner.engine.compatibility().await?;
        // A full disk is no reason against a branch in memory.
        let draft = self.branch_draft(&tag, 0).await?;
        crash::point("branch: draft begun");
        let branch = handle.ask(&request.id, Request::Branch).await?;
        let (over, pin) = self.base(&branch.base, &parent).await?;
        let pin = Arc::new(pin);
        let whole = request.full || pin.files().layers.len() >= limits::LAYERS;
        let memory = match whole {
            true => MemoryDraft::Full,
            false => MemoryDraft::Layer { over: over.clone() },
        };
        let about = about(&parent, memory, &request, branch.pause, facts);
        let manifest = in_memory(&draft, &about, over);
        let loaded = Loaded::new(branch.template, manifest, None, Arc::clone(&pin));
        let (tell, progress) = watch::channel(Progress::Writing);
        let behind = Behind {
            view: view_in_memory(&loaded.manifest, &draft, branch.pause),
            loaded: Arc::new(loaded),
            progress,
            cancel: CancellationToken::new(),
        };
        self.inner.templates.behind.insert(behind.clone());
        info!(%tag, pause_us = branch.pause.as_micros(), "branched; writing behind");
        let writing = Writing {
            node: self.clone(),
            behind: behind.clone(),
            about,
            below: whole.then_some(pin),
            tell,
        };
        self.inner.tasks.spawn(writing.run(draft));
        Ok(behind)
    }

    /// The snapshot on disk that a branch lies over, kept from now on.
    async fn base(&self, id: &str, parent: &Manifest) -> Result<(SnapshotRef, Pin), Error> {
        let (store, own) = (self.inner.store.clone(), parent.reference());
        let wanted = id.to_owned();
        let found = blocking(move || {
            let is_it = |reference: &SnapshotRef| templates::template_id(&reference.id) == wanted;
            let reference = if is_it(&own) {
                Some(own)
            } else {
                let listed = store.list()?.into_iter();
                let all = listed.filter_map(|line| line.snapshot);
                let mut all = all.map(|snapshot| snapshot.manifest.reference());
                all.find(is_it)
            };
            let Some(reference) = reference else {
                return Ok(None);
            };
            let pin = store.pin(&reference.tag)?;
            Ok::<_, forkd_snapshot::Error>(Some((reference, pin)))
        });
        found.await??.ok_or_else(|| {
            Error::new(
                ErrorCode::NotFound,
                format!("the snapshot below, known as {id}, has been removed"),
            )
            .with_remedy("fork a snapshot that is there, and branch that sandbox")
        })
    }

    /// Branches that are being written are finished before the daemon ends; those that could not be are
    /// lost with it.
    pub(super) async fn settle_branches(&self) {
        for behind in self.inner.templates.behind.all() {
            let tag = &behind.view.tag;
            let settled = tokio::time::timeout(limits::WRITE_AT_CLOSE, behind.settled()).await;
            match settled {
                Ok(Progress::Published(_) | Progress::Removed) => continue,
                Ok(Progress::Failed(_)) => warn!(%tag, "a branch in memory is lost"),
                Ok(Progress::Writing) | Err(_) => warn!(%tag, "a branch takes too long to write"),
            }
            self.inner.templates.behind.remove(tag);
            behind.give_up().await;
        }
    }
}

fn tag_of(request: &BranchRequest) -> Result<Tag, Error> {
    match request.tag.clone() {
        Some(tag) => Ok(tag),
        None => ids::branch_tag(),
    }
}

fn save_spec(draft: &Draft, layer: bool) -> SaveSpec {
    let memory = match layer {
        true => SaveMemory::Layer(LayerFiles {
            memory: draft.memory_path(),
            index: draft.index_path(),
        }),
        false => SaveMemory::Full(draft.memory_path()),
    };
    SaveSpec {
        memory,
        state: draft.state_path(),
    }
}

fn about(
    parent: &Manifest,
    memory: MemoryDraft,
    request: &BranchRequest,
    pause: std::time::Duration,
    compatibility: BTreeMap<String, String>,
) -> ManifestDraft {
    ManifestDraft {
        engine: parent.engine.clone(),
        machine: parent.machine.clone(),
        image: parent.image.clone(),
        memory,
        lineage: Lineage {
            parent: Some(parent.reference()),
            sandbox: Some(request.id.clone()),
        },
        compatibility,
        warm: parent.warm.clone(),
        labels: [("pause_us".to_owned(), pause.as_micros().to_string())].into(),
    }
}

/// The manifest that the snapshot will have, but for its files.
fn in_memory(draft: &Draft, about: &ManifestDraft, over: SnapshotRef) -> Manifest {
    Manifest {
        schema_version: SCHEMA_VERSION,
        id: draft.id().clone(),
        tag: draft.tag().clone(),
        created_at_ms: now_unix() * 1000,
        engine: about.engine.clone(),
        machine: about.machine.clone(),
        image: about.image.clone(),
        lineage: about.lineage.clone(),
        memory: match about.memory {
            MemoryDraft::Full => Memory::Full,
            MemoryDraft::Layer { .. } => Memory::Layer { over },
        },
        files: vec![],
        compatibility: about.compatibility.clone(),
        warm: about.warm.clone(),
        labels: about.labels.clone(),
        unknown: BTreeMap::new(),
    }
}

fn view_in_memory(manifest: &Manifest, draft: &Draft, pause: std::time::Duration) -> SnapshotView {
    let memory = draft.memory_path();
    let dir = memory.parent().unwrap_or(&memory).to_owned();
    let snapshot = Snapshot {
        dir,
        manifest: manifest.clone(),
    };
    SnapshotView {
        status: SnapshotStatus::Writing,
        physical_bytes: 0,
        pause: Some(pause),
        ..super::images::view(&snapshot)
    }
}
