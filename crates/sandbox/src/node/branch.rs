//! Branching: a running sandbox becomes a snapshot and goes on running.

use forkd_engine::{LayerFiles, SaveMemory, SaveReport, SaveSpec};
use forkd_snapshot::{Draft, Lineage, Manifest, ManifestDraft, MemoryDraft};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::Tag;

use super::{Node, blocking, cancelled_error};
use crate::actor::Request;
use crate::spec::BranchRequest;
use crate::view::SnapshotView;
use crate::{Error, ids, limits};

impl Node {
    /// Freezes a running sandbox into a new snapshot while it goes on.
    pub async fn branch(&self, request: BranchRequest) -> Result<SnapshotView, Error> {
        if !self.inner.engine.capabilities().branch {
            let text = format!(
                "the {} engine cannot branch a running sandbox",
                self.engine()
            );
            return Err(Error::new(ErrorCode::Unsupported, text));
        }
        self.guarded(|node, cancelled| async move {
            tokio::select! {
                branched = node.freeze(request) => branched,
                () = cancelled.cancelled() => Err(cancelled_error()),
            }
        })
        .await
    }

    async fn freeze(&self, request: BranchRequest) -> Result<SnapshotView, Error> {
        let handle = self.handle(&request.id)?;
        let source = handle.view();
        let tag = match request.tag.clone() {
            Some(tag) => tag,
            None => ids::branch_tag()?,
        };
        let parent = self.parent_manifest(&source.tag).await?;
        let layer = !request.full && self.inner.engine.capabilities().save_layer;
        let draft = self.branch_draft(&tag, parent.machine.memory_mib).await?;
        let spec = save_spec(&draft, layer);
        let saved = handle
            .ask(&request.id, |reply| Request::Save(spec, reply))
            .await?;
        let about = about(
            &parent,
            layer,
            &request,
            &saved,
            self.inner.engine.compatibility().await?,
        );
        let snapshot = blocking(move || draft.publish(about)).await??;
        let mut view = super::images::view(&snapshot);
        view.pause = Some(saved.pause);
        Ok(view)
    }

    async fn parent_manifest(&self, tag: &Tag) -> Result<Manifest, Error> {
        let (store, tag) = (self.inner.store.clone(), tag.clone());
        Ok(blocking(move || store.get(&tag)).await??.manifest)
    }

    async fn branch_draft(&self, tag: &Tag, memory_mib: u64) -> Result<Draft, Error> {
        let (store, tag) = (self.inner.store.clone(), tag.clone());
        let bytes = memory_mib * 1024 * 1024 + limits::DISK_FLOOR_BYTES;
        Ok(blocking(move || {
            let draft = store.begin(&tag)?;
            store.require_free(bytes)?;
            Ok::<_, forkd_snapshot::Error>(draft)
        })
        .await??)
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
    layer: bool,
    request: &BranchRequest,
    saved: &SaveReport,
    compatibility: std::collections::BTreeMap<String, String>,
) -> ManifestDraft {
    let pause_us = saved.pause.as_micros().to_string();
    ManifestDraft {
        engine: parent.engine.clone(),
        machine: parent.machine.clone(),
        image: parent.image.clone(),
        memory: match layer {
            true => MemoryDraft::Layer {
                over: parent.reference(),
            },
            false => MemoryDraft::Full,
        },
        lineage: Lineage {
            parent: Some(parent.reference()),
            sandbox: Some(request.id.clone()),
        },
        compatibility,
        warm: parent.warm.clone(),
        labels: [("pause_us".to_owned(), pause_us)].into(),
    }
}
