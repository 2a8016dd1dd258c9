//! A snapshot that Firecracker processes are forked from. It has no process: its RAM is a file that every fork maps
//! privately, its device state a file that every fork loads.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::launch::{self, Plan};
use super::names::{MEMORY, RECORD, ROOTFS, STATE};
use super::persist::{self, Record};
use super::request::{Request, Tracking};
use super::vm::FirecrackerVm;
use crate::jail::Walls;
use crate::memory;
use crate::rundir::failed;
use crate::statefile::Shape;
use crate::{Error, ForkSpec, ProcessIdentity, SlotHandles, Template, TemplateSpec, Vm, blocking};

/// The layers over the base, applied.
const FLAT: &str = "memory.bin";
/// Device state as Firecracker reads it.
const BARE: &str = "state.bin";

/// A template.
#[derive(Debug)]
pub(super) struct FirecrackerTemplate {
    walls: Walls,
    tracking: Tracking,
    /// How many forks are made at once, over all templates.
    gate: Arc<Semaphore>,
    shape: Shape,
    rootfs: PathBuf,
    /// The snapshot's own file, for those who want to know which.
    snapshot: PathBuf,
    state: PathBuf,
    ram: Arc<File>,
    ram_path: PathBuf,
    /// Files made by and for this template.
    own: Vec<PathBuf>,
}

impl FirecrackerTemplate {
    /// Checks a snapshot's files, applies its layers and takes its state out. Blocks.
    pub(super) fn open(
        spec: TemplateSpec,
        walls: Walls,
        tracking: Tracking,
        gate: Arc<Semaphore>,
    ) -> Result<FirecrackerTemplate, Error> {
        let shape = Shape::of(&spec.machine);
        let snapshot = persist::STATE.open(&spec.files.state, &spec.machine)?;
        let (flat, state) = (spec.run_dir.join(FLAT), spec.run_dir.join(BARE));
        // One of its own, too, where VMs may not read the snapshot's.
        let copied = !spec.files.layers.is_empty()
            || walls.strong() && !launch::is_public(&spec.files.memory)?;
        let make = || {
            let size = shape.memory_bytes();
            let ram = match copied {
                true => memory::flatten(&spec.files, size, &flat)?,
                false => memory::open_memory(&spec.files.memory, size)?,
            };
            let mut bare = File::create_new(&state).map_err(failed("create", &state))?;
            io::copy(&mut snapshot.devices()?, &mut bare).map_err(failed("write", &state))?;
            for own in [Some(&state), copied.then_some(&flat)]
                .into_iter()
                .flatten()
            {
                launch::make_public(own)?;
            }
            Ok(ram)
        };
        let mut own = vec![state.clone()];
        own.extend(copied.then(|| flat.clone()));
        let ram = make().inspect_err(|_| own.iter().for_each(|path| remove(path)))?;
        Ok(FirecrackerTemplate {
            walls,
            tracking,
            gate,
            shape,
            rootfs: spec.machine.rootfs,
            snapshot: spec.files.state,
            state,
            ram: Arc::new(ram),
            ram_path: if copied { flat } else { spec.files.memory },
            own,
        })
    }

    async fn fork_one(&self, spec: ForkSpec) -> Result<Arc<dyn Vm>, Error> {
        let _permit = self.gate.acquire().await.map_err(|_| closed())?;
        let slot = spec.slot.unwrap_or(SlotHandles::NONE);
        let user = self.walls.user(&spec.id, slot.uid);
        let record = Record {
            id: spec.id.clone(),
            shape: self.shape.clone(),
            base: Some(self.ram_path.clone()),
            user: user.as_ref().map(|user| user.id),
        };
        crate::record::write(&spec.run_dir.join(RECORD), &record)?;
        let ready = launch::start(Plan {
            walls: self.walls.clone(),
            user,
            id: spec.id,
            run_dir: spec.run_dir,
            shape: self.shape.clone(),
            files: vec![
                (self.rootfs.clone(), ROOTFS),
                (self.ram_path.clone(), MEMORY),
                (self.state.clone(), STATE),
            ],
            lifetime: spec.lifetime,
            slot,
        })
        .await?;
        let loaded = ready.monitor.ask(Request::Load(self.tracking)).await;
        loaded.map_err(|error| self.explain(error))?;
        let base = Some((Arc::clone(&self.ram), self.ram_path.clone()));
        Ok(FirecrackerVm::new(ready, record, base))
    }

    /// What Firecracker does not like is the snapshot.
    fn explain(&self, error: Error) -> Error {
        match error {
            Error::Control { detail, .. } => Error::Snapshot {
                path: self.snapshot.clone(),
                problem: format!("Firecracker cannot load it ({detail})"),
            },
            other => other,
        }
    }
}

#[async_trait]
impl Template for FirecrackerTemplate {
    fn identity(&self) -> Option<ProcessIdentity> {
        None
    }

    async fn fork(&self, specs: Vec<ForkSpec>) -> Vec<Result<Arc<dyn Vm>, Error>> {
        futures_util::future::join_all(specs.into_iter().map(|spec| self.fork_one(spec))).await
    }

    async fn close(&self) -> Result<(), Error> {
        let own = self.own.clone();
        blocking::run(move || {
            own.iter()
                .try_for_each(|path| match std::fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        Err(failed("remove", path)(error))
                    }
                    _ => Ok(()),
                })
        })
        .await
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "file is left over");
    }
}

fn closed() -> Error {
    Error::Control {
        step: "fork",
        detail: "the engine is being shut down".to_owned(),
    }
}
