//! The `firecracker` engine: Firecracker, for those who must have it, with the distribution's own kernel.
//!
//! ```text
//!   boot      kernel unpacked to ELF                       Firecracker process ─ save ─► memory, device state
//!   template  layers applied to a copy of the base, once
//!   fork      RAM is that file, private copy-on-write      Firecracker process ─ save ─► layer, device state
//! ```
//!
//! Device state is Firecracker's own. Memory of a fork is read from outside, by the pages that the kernel knows to be
//! the process's own: Firecracker knows only what was written since it was last saved.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use forkd_host::facts::Facts;
use forkd_host::process::Process;
use tokio::sync::{OnceCell, Semaphore};

mod arguments;
mod client;
mod facts;
mod kernel;
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

use facts::About;
use launch::{Plan, Ready};
use names::{INITRAMFS, KERNEL, MEMORY, RECORD, ROOTFS, UNPACKED};
use persist::Record;
use process::Monitor;
use request::Request;
use template::FirecrackerTemplate;
use vm::FirecrackerVm;

use crate::facts::Version;
use crate::jail::{Jail, Walls};
use crate::memory::{self, Ram};
use crate::output::Output;
use crate::rundir::{RunDir, failed};
use crate::statefile::Shape;
use crate::{
    BootSpec, Capabilities, Enforcement, Engine, Error, MachineSpec, ProcessIdentity, SlotHandles,
    Template, TemplateSpec, Vm, blocking, child, record,
};

/// The engine's name.
const NAME: &str = "firecracker";
/// The program, looked up in `PATH`.
pub const PROGRAM: &str = "firecracker";
/// Forks that are being made at once, per CPU. More only wait for each other.
const FORKS_PER_CPU: usize = 2;

/// The engine.
#[derive(Debug)]
pub struct Firecracker {
    program: PathBuf,
    jail: Jail,
    gate: Arc<Semaphore>,
    about: OnceCell<About>,
}

impl Firecracker {
    /// An engine that runs `program`, a path or a name in `PATH`. Nothing is checked yet.
    pub fn new(program: impl Into<PathBuf>) -> Firecracker {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Firecracker {
            program: program.into(),
            jail: Jail::new(true),
            gate: Arc::new(Semaphore::new(cpus * FORKS_PER_CPU)),
            about: OnceCell::new(),
        }
    }

    /// Whether VMs are confined to a jail each; they are unless this says otherwise.
    pub fn with_jail(self, jail: bool) -> Firecracker {
        Firecracker {
            jail: Jail::new(jail),
            ..self
        }
    }

    /// What the program says of itself; an error says what is missing. Asked once.
    async fn about(&self) -> Result<About, Error> {
        let ask = || async {
            let program = self.program.clone();
            blocking::run(move || facts::ask(&program)).await
        };
        self.about.get_or_try_init(ask).await.copied()
    }

    async fn walls(&self) -> &Walls {
        let prepared = self
            .jail
            .walls(&self.program, &walls::KIND, walls::contents);
        prepared.await
    }
}

#[async_trait]
impl Engine for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            branch: true,
            branch_writes_behind: false,
            save_layer: true,
            network: true,
            keeps_connections: false,
        }
    }

    fn opens_taps(&self) -> bool {
        true
    }

    async fn compatibility(&self) -> Result<BTreeMap<String, String>, Error> {
        let about = self.about().await?;
        Ok(blocking::run(move || facts::collect(about)).await)
    }

    fn difference(
        &self,
        recorded: &BTreeMap<String, String>,
        here: &BTreeMap<String, String>,
    ) -> Option<String> {
        facts::difference(recorded, here)
    }

    async fn enforcement(&self) -> Vec<(&'static str, Enforcement)> {
        self.walls().await.enforcement()
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, Error> {
        self.about().await?;
        blocking::run(require_kvm).await?;
        let walls = self.walls().await.clone();
        let slot = spec.slot.unwrap_or(SlotHandles::NONE);
        let user = walls.user(&spec.id, slot.uid);
        let record = Record {
            id: spec.id.clone(),
            shape: Shape::of(&spec.machine),
            base: None,
            user: user.as_ref().map(|user| user.id),
        };
        record::write(&spec.run_dir.join(RECORD), &record)?;
        let unpacked = spec.run_dir.join(UNPACKED);
        let (from, to) = (spec.machine.kernel.clone(), unpacked.clone());
        let unpack = move || kernel::unpack(&from, &to).and_then(|()| launch::make_public(&to));
        blocking::run(unpack).await?;
        let started = launch::start(Plan {
            walls,
            user,
            id: spec.id,
            run_dir: spec.run_dir,
            shape: record.shape.clone(),
            files: vec![
                (unpacked.clone(), KERNEL),
                (spec.machine.initramfs.clone(), INITRAMFS),
                (spec.machine.rootfs.clone(), ROOTFS),
            ],
            lifetime: spec.lifetime,
            slot,
        });
        let booted = match started.await {
            Ok(ready) => boot(&ready, &spec.machine).await.map(|()| ready),
            Err(error) => Err(error),
        };
        // It is in the guest's memory now, or never.
        let _ = blocking::run(move || std::fs::remove_file(unpacked)).await;
        Ok(FirecrackerVm::new(booted?, record, None))
    }

    async fn template(&self, spec: TemplateSpec) -> Result<Arc<dyn Template>, Error> {
        let tracking = self.about().await?.tracking();
        blocking::run(require_kvm).await?;
        let (walls, gate) = (self.walls().await.clone(), Arc::clone(&self.gate));
        let open = move || FirecrackerTemplate::open(spec, walls, tracking, gate);
        Ok(Arc::new(blocking::run(open).await?))
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
        let run_dir = Arc::new(found.run_dir);
        let console = launch::reopen_console(&run_dir)?;
        let console = launch::follow(console, &run_dir);
        let output = Output::lost();
        let monitor = Monitor::attach(found.process, Arc::clone(&run_dir), output, console)?;
        // Whoever finds fault with it later shall find it running.
        monitor.process.keep();
        monitor.is_running().await?;
        let ready = Ready {
            run_dir,
            monitor,
            tap: None,
        };
        Ok(Some(FirecrackerVm::new(ready, found.record, found.base)))
    }
}

/// Why a Firecracker of this version, such as `1.10.1`, cannot be used; `None`: it can be. A program that says no
/// version cannot.
pub fn objection(program: &Path, version: Option<&str>) -> Option<Error> {
    let version = version.and_then(|text| Version::after("", text));
    facts::judge(program, version).err()
}

/// Sets a machine up, and starts its guest.
async fn boot(ready: &Ready, machine: &MachineSpec) -> Result<(), Error> {
    let line = arguments::kernel_command_line(machine);
    let mut requests = vec![
        Request::Machine(machine),
        Request::BootSource(&line),
        Request::Disk,
        Request::Vsock,
        Request::Entropy,
    ];
    requests.extend(ready.tap.as_deref().map(Request::Network));
    requests.push(Request::Start);
    for request in requests {
        ready.monitor.ask(request).await?;
    }
    Ok(())
}

/// Firecracker runs nothing without hardware virtualisation.
fn require_kvm() -> Result<(), Error> {
    let kvm = Facts::collect().kvm;
    match kvm.is_usable() {
        true => Ok(()),
        false => Err(Error::Program {
            program: PROGRAM.to_owned(),
            problem: format!("it needs /dev/kvm, which cannot be opened ({kvm:?})"),
            remedy: "see `forkd doctor`, or use --engine qemu, which needs no /dev/kvm".to_owned(),
        }),
    }
}

struct Found {
    process: Process,
    run_dir: RunDir,
    record: Record,
    base: Option<(Arc<File>, PathBuf)>,
}

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
    let base = match &record.base {
        Some(base) => Some(find_base(identity.pid, &record, base)?),
        None => None,
    };
    Ok(Some(Found {
        process,
        run_dir: RunDir::open(run_dir)?,
        record,
        base,
    }))
}

/// The file that a fork maps its RAM from. The kernel knows it by its name in the VM's root, whatever has become of the
/// template; another may have taken its place by now.
fn find_base(pid: u32, record: &Record, base: &Path) -> Result<(Arc<File>, PathBuf), Error> {
    let name = match record.user {
        Some(_) => Path::new("/").join(MEMORY),
        None => base.to_owned(),
    };
    let ram = memory::mapped_ram(pid, &name, false).or_else(|_| Ram::open(base, false));
    match ram.map_err(failed("open", base))? {
        Ram::Shared(file, path) | Ram::Private(file, path) => Ok((file, path)),
    }
}

/// The program is not there.
fn missing(program: &Path) -> Error {
    Error::Program {
        program: program.display().to_string(),
        problem: "it is not installed".to_owned(),
        remedy: "put the firecracker of a release of it, 1.10 or later, on PATH; or use another --engine"
            .to_owned(),
    }
}
