//! A snapshot that QEMU processes are forked from. It has no process: its RAM is a file that every fork
//! maps privately, its device state a file that every fork loads.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::Setup;
use super::memory;
use super::names::RECORD;
use super::persist::{Record, Shape, StateFile};
use super::process::{self, First, Plan};
use super::vm::{QemuVm, Ram};
use crate::rundir::failed;
use crate::{Error, ForkSpec, MachineSpec, ProcessIdentity, Template, TemplateSpec, Vm, blocking};

/// The layers over the base, applied.
const FLAT: &str = "memory.bin";

/// A template.
#[derive(Debug)]
pub(super) struct QemuTemplate {
    setup: Arc<Setup>,
    /// How many forks are made at once, over all templates.
    gate: Arc<Semaphore>,
    machine: MachineSpec,
    state: StateFile,
    ram: PathBuf,
    /// Whether `ram` was made by and for this template.
    own_ram: bool,
}

impl QemuTemplate {
    /// Checks a snapshot's files and applies its layers. Blocks.
    pub(super) fn open(
        spec: TemplateSpec,
        setup: Arc<Setup>,
        gate: Arc<Semaphore>,
    ) -> Result<QemuTemplate, Error> {
        let state = StateFile::open(&spec.files.state, &spec.machine)?;
        let size = Shape::of(&spec.machine).memory_bytes();
        let own_ram = !spec.files.layers.is_empty();
        let ram = if own_ram {
            let flat = spec.run_dir.join(FLAT);
            memory::flatten(&spec.files, size, &flat).inspect_err(|_| remove(&flat))?;
            flat
        } else {
            memory::open_memory(&spec.files.memory, size)?;
            spec.files.memory
        };
        Ok(QemuTemplate {
            setup,
            gate,
            machine: spec.machine,
            state,
            ram,
            own_ram,
        })
    }

    async fn fork_one(&self, spec: ForkSpec) -> Result<Arc<dyn Vm>, Error> {
        let _permit = self.gate.acquire().await.map_err(|_| closed())?;
        let plan = self.plan(spec)?;
        let record = Record {
            id: plan.id.clone(),
            shape: Shape::of(&self.machine),
            ram: self.ram.clone(),
            shared: false,
        };
        record.write(&plan.run_dir.join(RECORD))?;
        let ram = Ram::open(&self.ram, false).map_err(failed("open", &self.ram))?;
        let (run_dir, monitor) = process::start(plan).await?;
        monitor
            .loaded()
            .await
            .map_err(|error| self.explain(error))?;
        Ok(QemuVm::new(run_dir, monitor, record.shape, ram))
    }

    fn plan(&self, spec: ForkSpec) -> Result<Plan, Error> {
        Ok(Plan {
            setup: Arc::clone(&self.setup),
            id: spec.id,
            run_dir: spec.run_dir,
            machine: self.machine.clone(),
            ram: self.ram.clone(),
            first: First::Load(self.state.devices()?),
            lifetime: spec.lifetime,
            slot: spec.slot,
        })
    }

    /// A process that leaves by itself while loading did not like the state.
    fn explain(&self, error: Error) -> Error {
        match error {
            Error::Exited { exit, output } if exit.starts_with("status") => Error::Snapshot {
                path: self.state.path().to_owned(),
                problem: format!("QEMU cannot load it ({output}); make the snapshot anew"),
            },
            other => other,
        }
    }
}

#[async_trait]
impl Template for QemuTemplate {
    fn identity(&self) -> Option<ProcessIdentity> {
        None
    }

    async fn fork(&self, specs: Vec<ForkSpec>) -> Vec<Result<Arc<dyn Vm>, Error>> {
        futures_util::future::join_all(specs.into_iter().map(|spec| self.fork_one(spec))).await
    }

    async fn close(&self) -> Result<(), Error> {
        if self.own_ram {
            let ram = self.ram.clone();
            blocking::run(move || match std::fs::remove_file(&ram) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(failed("remove", &ram)(error))
                }
                _ => Ok(()),
            })
            .await?;
        }
        Ok(())
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
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
