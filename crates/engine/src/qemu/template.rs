//! A snapshot that QEMU processes are forked from. It has no process: its RAM is a file that every fork
//! maps privately, its device state a file that every fork loads.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::launch::{self, First, Plan};
use super::names::RECORD;
use super::persist::{Record, STATE};
use super::vm::QemuVm;
use super::{Setup, arguments};
use crate::jail::Walls;
use crate::memory::{self, Ram};
use crate::rundir::failed;
use crate::statefile::{Shape, StateFile};
use crate::{
    Error, ForkSpec, MachineSpec, ProcessIdentity, SlotHandles, Template, TemplateSpec, Vm,
    blocking,
};

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
    walls: Walls,
    /// RAM, and what names it in a process.
    ram: File,
    ram_path: PathBuf,
    /// Whether the file at `ram_path` was made by and for this template.
    own_ram: bool,
}

impl QemuTemplate {
    /// Checks a snapshot's files and applies its layers. Blocks.
    ///
    /// QEMU opens its RAM for writing even where it is to be private. So VMs of other users than this one get a
    /// copy in memory that is sealed against writing.
    pub(super) fn open(
        spec: TemplateSpec,
        setup: Arc<Setup>,
        walls: Walls,
        gate: Arc<Semaphore>,
    ) -> Result<QemuTemplate, Error> {
        let state = STATE.open(&spec.files.state, &spec.machine)?;
        let size = Shape::of(&spec.machine).memory_bytes();
        let own_ram = !walls.strong() && !spec.files.layers.is_empty();
        let (ram, ram_path) = if walls.strong() {
            let sealed = memory::seal(&spec.files, size, &spec.id)?;
            (sealed, memory::sealed_path(&spec.id))
        } else if own_ram {
            let flat = spec.run_dir.join(FLAT);
            let ram = memory::flatten(&spec.files, size, &flat).inspect_err(|_| remove(&flat))?;
            (ram, flat)
        } else {
            let ram = memory::open_memory(&spec.files.memory, size)?;
            (ram, spec.files.memory)
        };
        Ok(QemuTemplate {
            setup,
            gate,
            machine: spec.machine,
            state,
            walls,
            ram,
            ram_path,
            own_ram,
        })
    }

    async fn fork_one(&self, spec: ForkSpec) -> Result<Arc<dyn Vm>, Error> {
        let _permit = self.gate.acquire().await.map_err(|_| closed())?;
        let plan = self.plan(spec)?;
        let record = Record {
            id: plan.id.clone(),
            shape: Shape::of(&self.machine),
            ram: self.ram_path.clone(),
            shared: false,
        };
        crate::record::write(&plan.run_dir.join(RECORD), &record)?;
        let ram = Ram::new(self.reopen_ram()?, &self.ram_path, false);
        let (run_dir, monitor) = launch::start(plan).await?;
        monitor
            .loaded()
            .await
            .map_err(|error| self.explain(error))?;
        Ok(QemuVm::new(run_dir, monitor, record.shape, ram))
    }

    fn plan(&self, spec: ForkSpec) -> Result<Plan, Error> {
        let slot = spec.slot.unwrap_or(SlotHandles::NONE);
        Ok(Plan {
            setup: Arc::clone(&self.setup),
            walls: self.walls.clone(),
            user: self.walls.user(&spec.id, slot.uid),
            id: spec.id,
            run_dir: spec.run_dir,
            machine: self.machine.clone(),
            ram: self.reopen_ram()?,
            first: First::Load(self.state.devices()?),
            lifetime: spec.lifetime,
            slot,
        })
    }

    /// RAM opened once more, for reading: those who share an open file share its position, too.
    fn reopen_ram(&self) -> Result<File, Error> {
        let path = arguments::inherited(self.ram.as_raw_fd());
        File::open(path).map_err(failed("open", &self.ram_path))
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
            let ram = self.ram_path.clone();
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
