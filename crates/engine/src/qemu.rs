//! The `qemu` engine: Debian's QEMU with the `microvm` machine and the distribution's own kernel, in
//! software emulation or with hardware virtualisation.
//!
//! ```text
//!   boot      RAM is a file, shared                        QEMU process ─ save ─► memory, device state
//!   template  layers applied to a copy of the base, once
//!   fork      RAM is that file, private copy-on-write      QEMU process ─ save ─► layer, device state
//! ```
//!
//! Device state is what `xen-save-devices-state` writes: everything except RAM, in QEMU's own stream
//! format, which a new process reads as an incoming migration. RAM never goes through QEMU.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use forkd_host::process::Process;
use forkd_host::tsc;
use rustix::process::{Gid, Uid};
use tokio::sync::{OnceCell, Semaphore};

mod arguments;
mod client;
mod facts;
mod launch;
mod names;
mod network;
mod persist;
mod process;
mod request;
mod template;
#[cfg(test)]
mod tests;
mod vm;
mod walls;

use launch::{First, Plan};
use names::{CONSOLE, CONSOLE_LOG, CONTROL, RECORD};
use network::Nowhere;
use persist::Record;
use process::Monitor;
use template::QemuTemplate;
use vm::QemuVm;

use crate::facts::Version;
use crate::jail::{Jail, Walls};
use crate::memory::{self, Ram};
use crate::output::Output;
use crate::rundir::{RunDir, failed};
use crate::statefile::Shape;
use crate::{
    BootSpec, Capabilities, Enforcement, Engine, Error, ProcessIdentity, SlotHandles, Template,
    TemplateSpec, Vm, blocking,
};
use crate::{child, console, record};
use forkd_host::chain;

/// The engine's name.
const NAME: &str = "qemu";
/// The program, looked up in `PATH`.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Forks that are being made at once, per CPU. More only wait for each other.
const FORKS_PER_CPU: usize = 2;

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Software emulation; runs everywhere.
    Tcg,
    /// Hardware virtualisation; needs /dev/kvm and a CPU with vmx or svm.
    Kvm,
}

impl Accel {
    /// The name users and QEMU know it by.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Tcg => "tcg",
            Accel::Kvm => "kvm",
        }
    }

    /// The CPU model guests see.
    fn cpu(self) -> &'static str {
        match self {
            // Five levels of page tables only make emulated page walks longer.
            Accel::Tcg => "max,la57=off",
            Accel::Kvm => "host",
        }
    }
}

/// How QEMU is run.
#[derive(Debug)]
struct Setup {
    program: PathBuf,
    accel: Accel,
    /// What confines VMs.
    jail: Jail,
    /// Where VMs without a tap have one that leads nowhere.
    nowhere: Nowhere,
}

impl Setup {
    async fn walls(&self) -> &Walls {
        let accel = self.accel;
        let contents = move |program: &Path| walls::contents(program, accel);
        self.jail.walls(&self.program, &walls::KIND, contents).await
    }
}

/// The engine.
#[derive(Debug)]
pub struct Qemu {
    setup: Arc<Setup>,
    gate: Arc<Semaphore>,
    tsc: tsc::Measurement,
    version: OnceCell<Version>,
}

impl Qemu {
    /// An engine that runs `program`, a path or a name in `PATH`. Nothing is checked yet.
    pub fn new(program: impl Into<PathBuf>, accel: Accel) -> Qemu {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Qemu {
            setup: Arc::new(Setup {
                program: program.into(),
                accel,
                jail: Jail::new(true),
                nowhere: Nowhere::default(),
            }),
            gate: Arc::new(Semaphore::new(cpus * FORKS_PER_CPU)),
            tsc: tsc::Measurement::begin(),
            version: OnceCell::new(),
        }
    }

    /// Whether VMs are confined to a jail each; they are unless this says otherwise.
    pub fn with_jail(self, jail: bool) -> Qemu {
        let setup = Setup {
            program: self.setup.program.clone(),
            accel: self.setup.accel,
            jail: Jail::new(jail),
            nowhere: Nowhere::default(),
        };
        Qemu {
            setup: Arc::new(setup),
            ..self
        }
    }

    /// The program's version; an error says what is missing. Asked once.
    async fn version(&self) -> Result<Version, Error> {
        let ask = || async {
            let program = self.setup.program.clone();
            blocking::run(move || facts::ask_version(&program)).await
        };
        self.version.get_or_try_init(ask).await.copied()
    }

    /// The rate of the time-stamp counter as guests without hardware virtualisation see it.
    async fn tsc_khz(&self) -> Option<u64> {
        if self.setup.accel == Accel::Kvm {
            return None;
        }
        tokio::time::sleep(self.tsc.remaining()).await;
        self.tsc.khz()
    }
}

#[async_trait]
impl Engine for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            branch: true,
            branch_writes_behind: false,
            save_layer: true,
            network: true,
            keeps_connections: true,
        }
    }

    async fn compatibility(&self) -> Result<BTreeMap<String, String>, Error> {
        let version = self.version().await?;
        let tsc_khz = self.tsc_khz().await;
        let accel = self.setup.accel;
        Ok(blocking::run(move || facts::collect(version, accel, tsc_khz)).await)
    }

    fn difference(
        &self,
        recorded: &BTreeMap<String, String>,
        here: &BTreeMap<String, String>,
    ) -> Option<String> {
        facts::difference(recorded, here)
    }

    async fn enforcement(&self) -> Vec<(&'static str, Enforcement)> {
        self.setup.walls().await.enforcement()
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, Error> {
        self.version().await?;
        let walls = self.setup.walls().await.clone();
        let slot = spec.slot.unwrap_or(SlotHandles::NONE);
        let user = walls.user(&spec.id, slot.uid);
        let (ram, shape) = (spec.memory_file.clone(), Shape::of(&spec.machine));
        let (path, size) = (ram.clone(), shape.memory_bytes());
        let owner = user.as_ref().map(|user| user.id);
        let file = blocking::run(move || make_ram(&path, size, owner)).await?;
        let plan = Plan {
            setup: Arc::clone(&self.setup),
            walls,
            user,
            id: spec.id,
            run_dir: spec.run_dir,
            ram: file,
            first: First::Boot(self.tsc_khz().await),
            machine: spec.machine,
            lifetime: spec.lifetime,
            slot,
        };
        let booted = boot(plan, &ram, shape).await;
        if booted.is_err() {
            let _ = blocking::run(move || std::fs::remove_file(ram)).await;
        }
        booted
    }

    async fn template(&self, spec: TemplateSpec) -> Result<Arc<dyn Template>, Error> {
        self.version().await?;
        let (setup, gate) = (Arc::clone(&self.setup), Arc::clone(&self.gate));
        let walls = self.setup.walls().await.clone();
        let opened = blocking::run(move || QemuTemplate::open(spec, setup, walls, gate)).await?;
        Ok(Arc::new(opened))
    }

    async fn adopt(
        &self,
        identity: ProcessIdentity,
        id: &str,
        run_dir: &Path,
    ) -> Result<Option<Arc<dyn Vm>>, Error> {
        let (id, path) = (id.to_owned(), run_dir.to_owned());
        let Some(found) = blocking::run(move || find(identity, &id, &path)).await? else {
            return Ok(None);
        };
        let (process, run_dir, record, ram) = found;
        let control = run_dir.connect_later(CONTROL).await;
        let control = control.map_err(failed("connect to", &run_dir.file(CONTROL)))?;
        let monitor = Monitor::attach(process, control, Output::lost())?;
        // Whoever finds fault with it later shall find it running.
        monitor.process.keep();
        monitor.command(request::Command::Capabilities).await?;
        match run_dir.connect_later(CONSOLE).await {
            Ok(socket) => {
                tokio::spawn(console::pump(socket, run_dir.file(CONSOLE_LOG)));
            }
            Err(error) => tracing::warn!(%error, "console of an adopted VM is lost"),
        }
        Ok(Some(QemuVm::new(run_dir, monitor, record.shape, ram)))
    }
}

async fn boot(plan: Plan, ram: &Path, shape: Shape) -> Result<Arc<dyn Vm>, Error> {
    let record = Record {
        id: plan.id.clone(),
        shape: shape.clone(),
        ram: ram.to_owned(),
        shared: true,
    };
    record::write(&plan.run_dir.join(RECORD), &record)?;
    let ram = Ram::open(ram, true).map_err(failed("open", ram))?;
    let (run_dir, monitor) = launch::start(plan).await?;
    monitor.process.check().await?;
    Ok(QemuVm::new(run_dir, monitor, shape, ram))
}

/// Makes the file that will be a guest's RAM. A disk too small for it would kill the guest when it
/// writes, long after.
fn make_ram(path: &Path, size: u64, owner: Option<u32>) -> Result<File, Error> {
    forkd_host::file::require_free(path.parent().unwrap_or(path), size).map_err(|error| {
        let kind = io::ErrorKind::StorageFull;
        failed("make guest memory", path)(io::Error::new(kind, chain(&error)))
    })?;
    let file = memory::create(path, size)?;
    if let Some(owner) = owner {
        let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
        let given = rustix::fs::fchown(&file, Some(uid), Some(gid));
        given.map_err(|errno| {
            let _ = std::fs::remove_file(path);
            failed("give away", path)(errno.into())
        })?;
    }
    Ok(file)
}

type Found = (Process, RunDir, Record, Ram);

/// Looks for a VM that an earlier daemon started. Blocks.
fn find(identity: ProcessIdentity, id: &str, run_dir: &Path) -> Result<Option<Found>, Error> {
    let name = arguments::name_argument(id);
    let Some(process) = child::adopt_named(identity, &name)? else {
        return Ok(None);
    };
    let path = run_dir.join(RECORD);
    let damaged = || failed("read", &path)(io::ErrorKind::InvalidData.into());
    let record = record::read(&path)
        .filter(|r: &Record| r.id == id)
        .ok_or_else(damaged)?;
    let ram = Ram::open(&record.ram, record.shared);
    let ram = ram.or_else(|_| memory::mapped_ram(identity.pid, &record.ram, record.shared));
    let ram = ram.map_err(failed("open", &record.ram))?;
    Ok(Some((process, RunDir::open(run_dir)?, record, ram)))
}

/// The program is not there.
fn missing(program: &Path) -> Error {
    Error::Program {
        program: program.display().to_string(),
        problem: "it is not installed".to_owned(),
        remedy: "install it with `apt-get install qemu-system-x86`".to_owned(),
    }
}
