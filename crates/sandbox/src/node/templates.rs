//! Warm templates: each snapshot that is forked has one, made at its first fork by whoever comes first.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use forkd_engine::{
    Engine, LayerFiles, Lifetime, MachineSpec, SnapshotFiles, Template, TemplateSpec,
};
use forkd_snapshot::{Manifest, Pin, SnapshotId, Store};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::Tag;
use tokio::sync::OnceCell;
use tracing::warn;

use super::behind::Table;
use super::blocking;
use crate::{Error, crash, ids};
use forkd_host::chain;

/// A template and what it keeps from being removed.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) template: Arc<dyn Template>,
    pub(super) manifest: Manifest,
    /// Where its files are, if it has any of its own.
    dir: Option<PathBuf>,
    _pin: Arc<Pin>,
}

type Cell = Arc<OnceCell<Arc<Loaded>>>;

#[derive(Debug, Default)]
pub(super) struct Templates {
    cells: Mutex<HashMap<String, Cell>>,
    /// Branches that are not on disk; their templates are theirs alone.
    pub(super) behind: Table,
}

impl Templates {
    /// The template of a snapshot, made if there is none. Concurrent callers share the making.
    pub(super) async fn get(
        &self,
        tag: &Tag,
        store: &Store,
        engine: &Arc<dyn Engine>,
        lifetime: Lifetime,
    ) -> Result<Arc<Loaded>, Error> {
        if let Some(behind) = self.behind.get(tag) {
            return behind.forkable();
        }
        let (opened, wanted) = (store.clone(), tag.clone());
        let snapshot = blocking(move || opened.get(&wanted)).await??;
        let id = snapshot.manifest.id.to_string();
        self.drop_dead(&id).await;
        let cell = Arc::clone(self.lock().entry(id).or_default());
        let loaded = cell
            .get_or_try_init(|| load(tag, store, engine, lifetime))
            .await?;
        Ok(Arc::clone(loaded))
    }

    /// Takes over a template of a snapshot that came to disk after it.
    pub(super) fn put(&self, loaded: Arc<Loaded>) {
        let id = loaded.manifest.id.to_string();
        self.lock()
            .insert(id, Arc::new(OnceCell::new_with(Some(loaded))));
    }

    /// A template whose process was killed is made anew.
    async fn drop_dead(&self, id: &str) {
        let dead = |cell: &Cell| cell.get().is_some_and(|l| !l.template.is_alive());
        let cell = match self.lock().entry(id.to_owned()) {
            Entry::Occupied(entry) if dead(entry.get()) => Some(entry.remove()),
            _ => None,
        };
        if let Some(loaded) = cell.and_then(|cell| cell.get().cloned()) {
            warn!(tag = %loaded.manifest.tag, "the template's process has ended; it is made anew");
            loaded.close().await;
        }
    }

    /// Lets go of a snapshot's template, if there is one, so that the snapshot can be removed.
    pub(super) async fn close(&self, id: &str) {
        let cell = self.lock().remove(id);
        if let Some(loaded) = cell.and_then(|cell| cell.get().cloned()) {
            loaded.close().await;
        }
    }

    pub(super) async fn close_all(&self) {
        let ids: Vec<String> = self.lock().keys().cloned().collect();
        for id in ids {
            self.close(&id).await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Cell>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loaded {
    pub(super) fn new(
        template: Arc<dyn Template>,
        manifest: Manifest,
        dir: Option<PathBuf>,
        pin: Arc<Pin>,
    ) -> Self {
        Self {
            template,
            manifest,
            dir,
            _pin: pin,
        }
    }

    pub(super) async fn close(&self) {
        if let Err(e) = self.template.close().await {
            warn!(error = chain(&e), tag = %self.manifest.tag, "template may have leaked");
        }
        if let Some(dir) = &self.dir
            && let Err(e) = tokio::fs::remove_dir_all(dir).await
            && e.kind() != std::io::ErrorKind::NotFound
        {
            warn!(error = %e, dir = %dir.display(), "template files may have leaked");
        }
    }
}

async fn load(
    tag: &Tag,
    store: &Store,
    engine: &Arc<dyn Engine>,
    lifetime: Lifetime,
) -> Result<Arc<Loaded>, Error> {
    let (opened, wanted) = (store.clone(), tag.clone());
    let pin = blocking(move || opened.pin(&wanted)).await??;
    let manifest = pin.snapshot().manifest.clone();
    if manifest.engine != engine.name() {
        let text = format!(
            "snapshot {tag} was made by the {} engine, this node runs {}",
            manifest.engine,
            engine.name()
        );
        let remedy = format!(
            "start with --engine {}, or build the snapshot again",
            manifest.engine
        );
        return Err(Error::new(ErrorCode::Incompatible, text).with_remedy(remedy));
    }
    engine.check_compatibility(&manifest.compatibility).await?;
    let dir = template_dir(store, &manifest.id)?;
    make_dir(&dir).await?;
    crash::point("template: directory made");
    let spec = TemplateSpec {
        id: template_id(&manifest.id),
        run_dir: dir.clone(),
        machine: machine_spec(&manifest)?,
        files: snapshot_files(&pin),
        lifetime,
    };
    match engine.template(spec).await {
        Ok(template) => {
            crash::point("template: made");
            Ok(Arc::new(Loaded::new(
                template,
                manifest,
                Some(dir),
                Arc::new(pin),
            )))
        }
        Err(e) => {
            // Whatever was made of it is useless; the engine's error is the one to tell.
            let _ = tokio::fs::remove_dir_all(&dir).await;
            Err(e.into())
        }
    }
}

/// On the snapshots' file system: an engine may flatten layers into a file as large as RAM here. Never the same
/// twice: a sandbox of an earlier daemon may run on the files of an earlier template.
pub(super) fn template_dir(store: &Store, id: &SnapshotId) -> Result<PathBuf, Error> {
    Ok(templates_root(store).join(format!("{id}-{}", ids::suffix()?)))
}

/// What a template is called by its engine; branches name what they lie over so.
pub(super) fn template_id(id: &SnapshotId) -> String {
    format!("template-{id}")
}

pub(super) fn templates_root(store: &Store) -> PathBuf {
    store.root().join(".templates")
}

pub(super) async fn make_dir(dir: &std::path::Path) -> Result<(), Error> {
    // A leftover of a crash would make the engine refuse: its files must not exist yet.
    let _ = tokio::fs::remove_dir_all(dir).await;
    tokio::fs::create_dir_all(dir).await.map_err(|e| {
        Error::new(
            ErrorCode::Internal,
            format!("cannot create {}", dir.display()),
        )
        .with_source(e)
    })
}

/// What a fork needs of the image. The root disk must still be there.
pub(super) fn machine_spec(manifest: &Manifest) -> Result<MachineSpec, Error> {
    let image = &manifest.image;
    if !image.rootfs.exists() {
        let text = format!(
            "snapshot {} needs the root disk {}, which is gone",
            manifest.tag,
            image.rootfs.display()
        );
        return Err(Error::new(ErrorCode::Corrupt, text).with_remedy(format!(
            "build the image {} again, then the snapshot",
            image.name
        )));
    }
    Ok(MachineSpec {
        vcpus: manifest.machine.vcpus,
        memory_mib: manifest.machine.memory_mib,
        kernel: image.kernel.clone(),
        initramfs: image.initramfs.clone(),
        rootfs: image.rootfs.clone(),
        cmdline: manifest.machine.cmdline.clone(),
        network: manifest.machine.network,
    })
}

fn snapshot_files(pin: &Pin) -> SnapshotFiles {
    let files = pin.files();
    let layer = |l: &forkd_snapshot::Layer| LayerFiles {
        memory: l.memory.clone(),
        index: l.index.clone(),
    };
    SnapshotFiles {
        memory: files.memory.clone(),
        layers: files.layers.iter().map(layer).collect(),
        state: files.state.clone(),
    }
}
