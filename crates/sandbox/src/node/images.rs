//! Listing, describing, compacting and removing snapshots.

use std::time::Duration;

use forkd_snapshot::{Dependents, Listed, Snapshot, Status};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::{SandboxId, Tag};

use super::behind::Behind;
use super::{Node, blocking};
use crate::Error;
use crate::spec::RemoveMode;
use crate::view::{Ending, SandboxStatus, SnapshotStatus, SnapshotView};

const MIB: u64 = 1024 * 1024;

impl Node {
    /// Every snapshot, by tag, unusable ones included.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotView>, Error> {
        let store = self.inner.store.clone();
        let root = store.root().to_owned();
        // First: what is published meanwhile is found on disk too, and told once, as it is then.
        let in_memory = self.inner.templates.behind.all();
        let listed = blocking(move || store.list()).await??;
        let mut views: Vec<SnapshotView> = listed
            .into_iter()
            .map(|line| listed_view(line, &root))
            .filter(|view| in_memory.iter().all(|behind| behind.view.tag != view.tag))
            .collect();
        views.extend(in_memory.iter().map(Behind::view));
        views.sort_by(|a, b| a.tag.cmp(&b.tag));
        Ok(views)
    }

    /// One snapshot.
    pub async fn snapshot(&self, tag: &Tag) -> Result<SnapshotView, Error> {
        if let Some(behind) = self.inner.templates.behind.get(tag) {
            return Ok(behind.view());
        }
        let (store, wanted) = (self.inner.store.clone(), tag.clone());
        Ok(view(&blocking(move || store.get(&wanted)).await??))
    }

    /// Tags of the snapshots directly above `tag`, and ids of its live sandboxes.
    pub async fn dependents(&self, tag: &Tag) -> Result<(Vec<Tag>, Vec<SandboxId>), Error> {
        let above = self.snapshots().await?;
        let above = above
            .into_iter()
            .filter(|s| s.parent.as_ref() == Some(tag))
            .map(|s| s.tag);
        Ok((above.collect(), self.live_of(tag)))
    }

    fn live_of(&self, tag: &Tag) -> Vec<SandboxId> {
        let views = self.sandboxes().into_iter();
        views
            .filter(|v| v.tag == *tag && v.status != SandboxStatus::Ended)
            .map(|v| v.id)
            .collect()
    }

    /// Removes a snapshot.
    pub async fn remove_snapshot(&self, tag: &Tag, mode: RemoveMode) -> Result<(), Error> {
        let mut on_disk = self.inner.templates.behind.get(tag).is_none();
        let doomed = self.doomed(tag, mode).await?;
        for (above, tag) in doomed.iter().enumerate() {
            let live = self.live_of(tag);
            match mode {
                RemoveMode::Refuse if !live.is_empty() => return Err(in_use(tag, &live)),
                RemoveMode::Refuse | RemoveMode::Force => {}
                RemoveMode::Cascade => {
                    for id in live {
                        let why = "its snapshot was removed";
                        self.kill_because(&id, Ending::Killed, why).await?;
                    }
                }
            }
            if mode == RemoveMode::Refuse {
                self.refuse_base_of_unwritten(tag)?;
            }
            match self.inner.templates.behind.remove(tag) {
                Some(behind) => {
                    // It may have come to disk at the last moment.
                    if behind.give_up().await {
                        self.close_template(tag).await;
                        on_disk |= above == 0;
                    }
                }
                None => self.close_template(tag).await,
            }
        }
        if !on_disk {
            return Ok(());
        }
        let dependents = match mode {
            RemoveMode::Refuse => Dependents::Refuse,
            RemoveMode::Cascade => Dependents::Cascade,
            RemoveMode::Force => Dependents::Detach,
        };
        let (store, tag) = (self.inner.store.clone(), tag.clone());
        blocking(move || store.remove(&tag, dependents)).await??;
        Ok(())
    }

    /// A branch in memory needs the files below it as one on disk does.
    fn refuse_base_of_unwritten(&self, tag: &Tag) -> Result<(), Error> {
        let above = self.inner.templates.behind.all().into_iter();
        let above: Vec<String> = above
            .filter(|behind| behind.view.parent.as_ref() == Some(tag))
            .map(|behind| behind.view.tag.to_string())
            .collect();
        if above.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::InUse,
            format!("snapshot {tag} is the base of {}", above.join(", ")),
        )
        .with_remedy("remove those first or all of them with --cascade"))
    }

    /// The snapshot and, for a cascade, all that lie over it.
    async fn doomed(&self, tag: &Tag, mode: RemoveMode) -> Result<Vec<Tag>, Error> {
        let mut doomed = vec![tag.clone()];
        if mode != RemoveMode::Cascade {
            return Ok(doomed);
        }
        let all = self.snapshots().await?;
        let mut next = 0;
        while let Some(base) = doomed.get(next).cloned() {
            let above = all
                .iter()
                .filter(|s| s.parent.as_ref() == Some(&base))
                .map(|s| s.tag.clone());
            for tag in above.collect::<Vec<_>>() {
                if !doomed.contains(&tag) {
                    doomed.push(tag);
                }
            }
            next += 1;
        }
        Ok(doomed)
    }

    async fn close_template(&self, tag: &Tag) {
        let (store, wanted) = (self.inner.store.clone(), tag.clone());
        // A damaged snapshot has no template, and can be removed all the same.
        if let Ok(Ok(snapshot)) = blocking(move || store.get(&wanted)).await {
            self.inner
                .templates
                .close(snapshot.manifest.id.as_str())
                .await;
        }
    }

    /// Writes a snapshot without layers that equals `tag`.
    pub async fn compact(&self, tag: &Tag, to: &Tag) -> Result<SnapshotView, Error> {
        self.refuse_when_closing()?;
        self.inner.templates.behind.refuse_unwritten(tag)?;
        self.inner.templates.behind.refuse_taken(to)?;
        let (store, tag, to) = (self.inner.store.clone(), tag.clone(), to.clone());
        Ok(view(&blocking(move || store.flatten(&tag, &to)).await??))
    }
}

fn in_use(tag: &Tag, live: &[SandboxId]) -> Error {
    let ids: Vec<&str> = live.iter().map(SandboxId::as_str).collect();
    Error::new(
        ErrorCode::InUse,
        format!("snapshot {tag} has live sandboxes: {}", ids.join(", ")),
    )
    .with_remedy(format!(
        "kill them first, with `forkd kill --tag {tag}`, or use --cascade"
    ))
}

/// A published snapshot, as told to users.
pub(super) fn view(snapshot: &Snapshot) -> SnapshotView {
    let manifest = &snapshot.manifest;
    let label = |name: &str| {
        manifest
            .labels
            .get(name)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let parent = manifest.lineage.parent.as_ref();
    SnapshotView {
        tag: manifest.tag.clone(),
        id: manifest.id.to_string(),
        dir: snapshot.dir.clone(),
        status: SnapshotStatus::Ready,
        bootable: true,
        problem: None,
        created_at_unix: manifest.created_at_ms / 1000,
        engine: manifest.engine.clone(),
        image: manifest.image.name.clone(),
        image_digest: manifest.image.digest.clone(),
        warm: manifest.warm.clone(),
        labels: manifest.labels.clone(),
        memory_mib: manifest.machine.memory_mib,
        vcpus: manifest.machine.vcpus,
        parent: parent.map(|p| p.tag.clone()),
        branched_from: manifest.lineage.sandbox.clone(),
        pause: label("pause_us").map(Duration::from_micros),
        memory_logical_bytes: manifest.machine.memory_mib * MIB,
        physical_bytes: snapshot.usage().physical_bytes,
        layered: manifest.memory.over().is_some(),
    }
}

fn listed_view(line: Listed, root: &std::path::Path) -> SnapshotView {
    if let Some(snapshot) = &line.snapshot {
        return view(snapshot);
    }
    let status = match line.status {
        Status::Writing => SnapshotStatus::Writing,
        Status::Ready | Status::Failed => SnapshotStatus::Failed,
    };
    SnapshotView {
        dir: root.join(line.tag.as_str()),
        tag: line.tag,
        id: String::new(),
        status,
        bootable: false,
        problem: line.problem.map(|damage| forkd_host::chain(&damage)),
        created_at_unix: 0,
        engine: String::new(),
        image: String::new(),
        image_digest: String::new(),
        warm: None,
        labels: std::collections::BTreeMap::new(),
        memory_mib: 0,
        vcpus: 0,
        parent: None,
        branched_from: None,
        pause: None,
        memory_logical_bytes: 0,
        physical_bytes: 0,
        layered: false,
    }
}
