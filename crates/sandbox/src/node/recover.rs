//! Opening a node: taking over what an earlier daemon left, and sweeping what nobody owns.
//!
//! There is no second code path for recovery: each record becomes an actor again, which is told whether its VM
//! lives, and goes on from there. What is left then in the run directory belongs to nobody.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use forkd_engine::{Engine, Vm};
use forkd_host::file::{self, LockFile};
use forkd_host::orphans;
use forkd_snapshot::Store;
use forkd_wire::error::ErrorCode;
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::templates::{Templates, templates_root};
use super::{Inner, Node, blocking};
use crate::Error;
use crate::actor::{self, Context};
use crate::admission::{self, Ledger};
use crate::place::{PlaceRecord, Places};
use crate::record::{Records, RequestId, SandboxRecord};
use crate::spec::NodeConfig;
use crate::view::{Ending, Recovery, SandboxView};

/// The programs that engines run VMs with.
const VM_PROGRAMS: &[&str] = &["qemu-system-x86_64", "forkd-vmm", "firecracker"];

impl Node {
    /// Opens the store and the records, adopts what runs and sweeps what is orphaned.
    pub async fn open(
        config: NodeConfig,
        engine: Arc<dyn Engine>,
    ) -> Result<(Node, Recovery), Error> {
        let files = config.clone();
        let (lock, store, records) = blocking(move || open_files(&files)).await??;
        let places = open_places(&config, &records).await?;
        let admission = Ledger::new(
            config.admission,
            admission::Places {
                snapshots: config.snapshot_root.clone(),
                records: config.state.clone(),
                run: config.run_dir.clone(),
                group: places.group().map(Path::to_owned),
            },
        );
        let context = Arc::new(Context {
            records,
            run_dir: config.run_dir.clone(),
            places: Arc::new(places),
        });
        let inner = Inner {
            config,
            engine,
            store,
            context,
            sandboxes: Mutex::new(BTreeMap::new()),
            templates: Templates::default(),
            admission,
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            _lock: lock,
        };
        let node = Node {
            inner: Arc::new(inner),
        };
        node.refuse_to_go_without().await?;
        let mut recovery = Recovery::default();
        node.restore_sandboxes(&mut recovery).await?;
        node.sweep(&mut recovery).await?;
        Ok((node, recovery))
    }

    /// A node that must keep sandboxes apart in every way does not open where it cannot.
    async fn refuse_to_go_without(&self) -> Result<(), Error> {
        if !self.inner.config.isolation.required {
            return Ok(());
        }
        let missing = self.missing().await;
        if missing.is_empty() {
            return Ok(());
        }
        let list = missing.iter().map(|m| format!("{}: {}", m.what, m.why));
        let list = list.collect::<Vec<_>>().join("; ");
        // Nothing runs, so nothing of it is to be left.
        let places = Arc::clone(&self.inner.context.places);
        blocking(move || places.close()).await?;
        let text = format!("this node must keep sandboxes apart in every way, but lacks: {list}");
        let error = Error::new(ErrorCode::Incompatible, text);
        Err(error.with_remedy("mend that, or start without --require-isolation"))
    }

    async fn restore_sandboxes(&self, recovery: &mut Recovery) -> Result<(), Error> {
        let cut_off = self.cut_off_requests().await?;
        let mut restored = vec![];
        for record in self.inner.context.records.all().await? {
            match record {
                Ok(record) => restored.push(self.restore(record, &cut_off)),
                Err(problem) => {
                    warn!(problem, "record ignored");
                    recovery.swept.push(problem);
                }
            }
        }
        for view in join_all(restored).await {
            match view.ended {
                None => recovery.adopted.push(view.id),
                Some(why) => recovery.lost.push((view.id, why)),
            }
        }
        self.start_over(cut_off).await
    }

    /// A sandbox whose request was never answered is not kept: nobody knows of it, and the request may come again.
    async fn restore(&self, record: SandboxRecord, cut_off: &HashSet<RequestId>) -> SandboxView {
        let id = record.id.clone();
        let request = record.request.as_ref();
        let unanswered = request.is_some_and(|request| cut_off.contains(request));
        let vm = self.adopt(&record).await;
        if vm.is_none() {
            self.clear_unknown(&record).await;
        }
        let (handle, task) = actor::recovered(Arc::clone(&self.inner.context), record, vm).await;
        self.inner.tasks.spawn(task);
        self.lock().insert(id, handle.clone());
        if unanswered {
            handle.stop(
                Ending::Undone,
                "the daemon ended before its request was answered",
            );
            return handle.ended().await;
        }
        handle.view()
    }

    /// Between the start of a VM and the record of its pid a crash leaves a process that no record knows.
    async fn clear_unknown(&self, record: &SandboxRecord) {
        let dir = self.inner.config.run_dir.join(record.id.as_str());
        if let Ok(Err(e)) | Err(e) = blocking(move || clear_dir(&dir)).await {
            warn!(id = %record.id, error = e.chain(), "a VM may have leaked");
        }
    }

    /// The VM of a record, if its process is still the same.
    async fn adopt(&self, record: &SandboxRecord) -> Option<Arc<dyn Vm>> {
        let process = record.process?;
        if record.engine != self.inner.engine.name() {
            warn!(id = %record.id, engine = record.engine, "sandbox of another engine is given up");
            return None;
        }
        let dir = self.inner.config.run_dir.join(record.id.as_str());
        match self
            .inner
            .engine
            .adopt(process, record.id.as_str(), &dir)
            .await
        {
            Ok(vm) => vm,
            Err(e) => {
                warn!(id = %record.id, error = forkd_host::chain(&e), "sandbox cannot be adopted");
                None
            }
        }
    }

    /// Removes run directories that no live sandbox has, and kills whatever still uses them.
    async fn sweep(&self, recovery: &mut Recovery) -> Result<(), Error> {
        let views = self.sandboxes();
        let live: Vec<(String, u32)> = views
            .iter()
            .filter(|view| recovery.adopted.contains(&view.id))
            .filter_map(|view| Some((view.id.to_string(), view.pid?)))
            .collect();
        let run_dir = self.inner.config.run_dir.clone();
        let templates = templates_root(&self.inner.store);
        let swept = blocking(move || {
            let names: Vec<&str> = live.iter().map(|(name, _)| name.as_str()).collect();
            let pids: Vec<u32> = live.iter().map(|(_, pid)| *pid).collect();
            let mut swept = sweep_dir(&run_dir, |dir| {
                dir.file_name()
                    .is_some_and(|name| names.iter().any(|live| name == *live))
            })?;
            // A template of an earlier daemon is of no use to this one, but a sandbox may run on its files.
            swept.extend(sweep_dir(&templates, |dir| {
                orphans::users(dir, VM_PROGRAMS)
                    .iter()
                    .any(|user| pids.contains(&user.pid))
            })?);
            Ok::<_, Error>(swept)
        })
        .await??;
        for path in swept {
            info!(path, "orphan swept");
            recovery.swept.push(path);
        }
        Ok(())
    }
}

/// Takes hold of host resources. What recorded sandboxes have is left to them; all else of this node is swept.
async fn open_places(config: &NodeConfig, records: &Records) -> Result<Places, Error> {
    let in_use = records.all().await?.into_iter().flatten();
    let in_use: Vec<PlaceRecord> = in_use.map(|record| record.place).collect();
    let (isolation, owner) = (config.isolation.clone(), config.state.clone());
    let places = blocking(move || {
        let places = Places::open(&isolation, &owner, &in_use);
        // A node that prepares for forks, or must not lack anything, wants to know at once.
        if isolation.slots_ready > 0 || isolation.required {
            places.try_all();
        }
        places
    })
    .await?;
    for missing in places.missing() {
        info!(
            what = missing.what,
            why = missing.why,
            "not enforced on this host"
        );
    }
    Ok(places)
}

fn open_files(config: &NodeConfig) -> Result<(LockFile, Store, Records), Error> {
    for dir in [
        config.run_dir.as_path(),
        config.state.parent().unwrap_or_else(|| Path::new(".")),
    ] {
        file::create_dir(dir).map_err(|e| host_error("cannot use a directory", e))?;
    }
    let lock = LockFile::acquire(&lock_path(&config.state)).map_err(locked)?;
    let store = Store::open(config.snapshot_root.clone())?;
    let records = Records::open(&config.state)?;
    Ok((lock, store, records))
}

fn lock_path(state: &Path) -> PathBuf {
    let mut name = state.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

fn locked(error: file::Error) -> Error {
    match &error {
        file::Error::Locked { holder, .. } => {
            let who = holder.map_or_else(String::new, |pid| format!(" (process {pid})"));
            let text = format!("another forkd{who} is using this state: {error}");
            Error::new(ErrorCode::InUse, text).with_remedy(
                "talk to that daemon with --daemon-url, wait for it, or use another --data-dir",
            )
        }
        _ => host_error("cannot lock the state", error),
    }
}

fn host_error(text: &str, error: file::Error) -> Error {
    Error::new(ErrorCode::Internal, text).with_source(error)
}

fn sweep_dir(dir: &Path, in_use: impl Fn(&Path) -> bool) -> Result<Vec<String>, Error> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(io_error("list", dir, e)),
    };
    let mut swept = vec![];
    for entry in entries {
        let entry = entry.map_err(|e| io_error("list", dir, e))?;
        if !entry.path().is_dir() || in_use(&entry.path()) {
            continue;
        }
        clear_dir(&entry.path())?;
        swept.push(entry.path().display().to_string());
    }
    Ok(swept)
}

/// Kills every process that uses a directory, then removes it.
pub(super) fn clear_dir(dir: &Path) -> Result<(), Error> {
    orphans::kill_users(dir, VM_PROGRAMS).map_err(|e| {
        let text = format!("cannot kill the processes that use {}", dir.display());
        Error::new(ErrorCode::Internal, text).with_source(e)
    })?;
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io_error("remove", dir, e)),
        _ => Ok(()),
    }
}

fn io_error(step: &str, path: &Path, error: std::io::Error) -> Error {
    Error::new(
        ErrorCode::Internal,
        format!("cannot {step} {}", path.display()),
    )
    .with_source(error)
}
