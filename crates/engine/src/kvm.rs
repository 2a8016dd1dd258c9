//! The `kvm` engine: the built-in monitor, `forkd-vmm`, whose processes fork as processes do.
//!
//! ```text
//!   boot      a process of its own                        forkd-vmm ─ save ─► memory, device state
//!   template  maps the files, layers applied, and waits   forkd-vmm
//!   fork      fork(2) of the template                     forkd-vmm ─ branch ─► template, files behind
//! ```
//!
//! Every process is a child of this one, whoever forked it, and has a control socket of its own. A VM
//! that is tied to this program ends when its socket closes; one that survives waits at a socket in its
//! run directory for the next daemon. Orphans are found by their console, which they hold open there.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use forkd_host::process::Process;
use tokio::sync::OnceCell;

mod arguments;
mod branch;
mod client;
mod facts;
mod names;
mod persist;
mod process;
mod program;
mod template;
#[cfg(test)]
mod tests;
mod vm;

use names::RECORD;
use persist::Record;
use process::{Hold, Launch, Monitor, number};
use template::KvmTemplate;
use vm::{KvmVm, Place};

use crate::child;
use crate::output::Output;
use crate::rundir::{RunDir, failed};
use crate::{
    BootSpec, Capabilities, Enforcement, Engine, Error, Lifetime, ProcessIdentity, SlotHandles,
    Template, TemplateSpec, Vm, blocking,
};

/// The engine's name.
const NAME: &str = "kvm";
/// How long a machine may take to be put together: its kernel is read and unpacked into its memory.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long a VM that an earlier daemon left may take to answer.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);

/// Looks for the monitor's program: what `FORKD_VMM` names, else beside the running program, below its
/// `lib/forkd`, or on `PATH`. The error says what would help.
pub fn find_program() -> Result<PathBuf, Error> {
    program::find()
}

/// The engine.
#[derive(Debug, Default)]
pub struct Kvm {
    named: Option<PathBuf>,
    /// Whether the jail is off.
    unconfined: bool,
    program: OnceCell<PathBuf>,
    facts: OnceCell<BTreeMap<String, String>>,
}

impl Kvm {
    /// An engine that runs the program it finds. Nothing is looked for yet.
    pub fn new() -> Kvm {
        Kvm::default()
    }

    /// An engine that runs this program.
    pub fn with_program(program: impl Into<PathBuf>) -> Kvm {
        Kvm {
            named: Some(program.into()),
            ..Kvm::default()
        }
    }

    /// The same, with VMs in their jail or, to find faults, without.
    pub fn with_jail(self, jail: bool) -> Kvm {
        Kvm {
            unconfined: !jail,
            ..self
        }
    }

    async fn program(&self) -> Result<PathBuf, Error> {
        let find = || async {
            match self.named.clone() {
                Some(named) => Ok(named),
                None => blocking::run(program::find).await,
            }
        };
        self.program.get_or_try_init(find).await.cloned()
    }

    /// What the program says of this host; an error says what is missing. Asked once.
    async fn facts(&self) -> Result<&BTreeMap<String, String>, Error> {
        let ask = || async {
            let program = self.program().await?;
            blocking::run(move || facts::ask(&program)).await
        };
        self.facts.get_or_try_init(ask).await
    }
}

#[async_trait]
impl Engine for Kvm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            branch: true,
            branch_writes_behind: true,
            save_layer: true,
            network: true,
            keeps_connections: true,
        }
    }

    async fn compatibility(&self) -> Result<BTreeMap<String, String>, Error> {
        self.facts().await.cloned()
    }

    fn difference(
        &self,
        recorded: &BTreeMap<String, String>,
        here: &BTreeMap<String, String>,
    ) -> Option<String> {
        facts::difference(recorded, here)
    }

    async fn enforcement(&self) -> Vec<(&'static str, Enforcement)> {
        let why = || Enforcement::NotEnforced {
            why: "the jail is off (--jail off)".to_owned(),
        };
        // The monitor does not start a machine that it cannot confine.
        let state = |_| match self.unconfined {
            true => why(),
            false => Enforcement::Enforced,
        };
        ["user", "root", "namespaces", "seccomp"]
            .map(|layer| (layer, state(layer)))
            .into()
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, Error> {
        self.facts().await?;
        let program = self.program().await?;
        let mut spec = spec;
        template::check_slot(spec.slot.as_ref())?;
        let slot = spec.slot.take().unwrap_or(SlotHandles::NONE);
        let (id, dir, lifetime) = (spec.id.clone(), spec.run_dir.clone(), spec.lifetime);
        let place = blocking::run(move || Place::make(&id, &dir, true, lifetime)).await?;
        let monitor =
            process::start(boot_launch(program, !self.unconfined, &spec, slot, &place)?).await?;
        monitor.running("boot", BOOT_LIMIT).await?;
        Ok(KvmVm::new(monitor, place))
    }

    async fn template(&self, spec: TemplateSpec) -> Result<Arc<dyn Template>, Error> {
        self.facts().await?;
        let program = self.program().await?;
        Ok(Arc::new(
            KvmTemplate::load(spec, program, !self.unconfined).await?,
        ))
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
        let (process, control, record) = found;
        let monitor = Monitor::attach(process, control, Output::lost(), Hold::Free)?;
        // Whoever finds fault with it later shall find it running.
        monitor.process.keep();
        let step = "greet a VM of an earlier daemon";
        let status = forkd_wire::vmm::Request::Status;
        monitor.ask(step, &status, &[], ADOPT_LIMIT).await?;
        let run_dir = run_dir.to_owned();
        Ok(Some(KvmVm::adopted(monitor, run_dir, record.booted)))
    }
}

fn boot_launch(
    program: PathBuf,
    jail: bool,
    spec: &BootSpec,
    slot: SlotHandles,
    place: &Place,
) -> Result<Launch, Error> {
    let pair = client::pair().map_err(failed("make a socket for", &spec.run_dir));
    let (ours, theirs) = pair?;
    let copy = |fd: std::io::Result<OwnedFd>| fd.map_err(failed("open", &spec.run_dir));
    let vsock = copy(place.vsock.try_clone())?;
    let console = copy(place.console.try_clone().map(OwnedFd::from))?;
    let rendezvous = place.rendezvous.as_ref().map(|fd| copy(fd.try_clone()));
    let rendezvous = rendezvous.transpose()?;
    let fds = arguments::BootFds {
        control: number(&theirs),
        vsock: number(&vsock),
        console: number(&console),
        rendezvous: rendezvous.as_ref().map(number),
        tap: slot.tap.as_ref().map(number),
    };
    let args = arguments::boot(&spec.machine, fds, jail);
    let mut inherit = vec![theirs, vsock, console];
    inherit.extend(rendezvous);
    inherit.extend(slot.tap);
    Ok(Launch {
        program,
        args,
        ours,
        inherit,
        die_with_parent: spec.lifetime == Lifetime::DieWithParent,
        cgroup: slot.cgroup,
    })
}

type Found = (Process, OwnedFd, Record);

/// Looks for a VM that an earlier daemon started, and connects to it. Blocks.
fn find(identity: ProcessIdentity, id: &str, run_dir: &Path) -> Result<Option<Found>, Error> {
    let Some(process) = child::adopt(identity)? else {
        return Ok(None);
    };
    if !process::runs_monitor(identity.pid) {
        return Ok(None);
    }
    let record = run_dir.join(RECORD);
    let Some(record) = crate::record::read(&record).filter(|record: &Record| record.id == id)
    else {
        return Ok(None);
    };
    let dir = RunDir::open(run_dir)?;
    let control = vm::reach(&dir).map_err(failed("connect to", &dir.file(names::CONTROL)))?;
    Ok(Some((process, control, record)))
}

/// What this engine does not do.
fn refuse(what: &'static str) -> Error {
    Error::Unsupported { engine: NAME, what }
}
