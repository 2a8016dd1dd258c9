//! The `fake` engine: the contract without virtual machines. Guests live in this process, begin in no
//! time and cost a few KiB, so that what stands above the engine can be tested by the thousand, with
//! failures where they are wanted.
//!
//! A guest has files, variables and a few built-in commands, behind the same agent protocol as a real
//! one. Its "RAM" is that state, written down with a checksum at the beginning of an otherwise empty
//! memory file of the machine's size; layers are real layers of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;

mod agent;
mod eval;
mod files;
mod guest;
mod image;
mod process;
#[cfg(test)]
mod tests;
mod vm;

use guest::State;
use vm::FakeVm;

use crate::{
    BootSpec, BranchSpec, Capabilities, Engine, Error, ForkSpec, MachineSpec, ProcessIdentity,
    Template, TemplateSpec, Vm, blocking,
};

const NAME: &str = "fake";
/// Above the largest process id that Linux can be told to give out, 2^22: never a real process.
const FIRST_PID: u32 = 1 << 23;

/// What the fake does besides working.
#[derive(Debug, Clone, Default)]
pub struct FakeConfig {
    /// How long a boot takes until the agent answers.
    pub boot_delay: Duration,
    /// How long each fork takes.
    pub fork_delay: Duration,
    /// How long a save takes while the guest stands still.
    pub save_delay: Duration,
    /// Boots fail.
    pub fail_boot: bool,
    /// Every so-many-th fork fails, counted over the engine's life.
    pub fail_fork_every: Option<u64>,
    /// Saves fail.
    pub fail_save: bool,
    /// A branch can be forked before it is written; then the delay and the failure of a save are those
    /// of writing behind.
    pub write_behind: bool,
    /// So many first attempts to write a branch behind fail.
    pub fail_writes: u32,
    /// Forks of a branch keep the user of the VM that was branched.
    pub branches_keep_user: bool,
    /// Connections to the agent are made, but it never answers.
    pub mute: bool,
    /// VMs end by themselves after this long, as if killed.
    pub exit_after: Option<Duration>,
}

/// The engine.
#[derive(Debug, Default)]
pub struct Fake {
    config: Arc<FakeConfig>,
    forks: Arc<AtomicU64>,
}

impl Fake {
    /// An engine that behaves as told.
    pub fn new(config: FakeConfig) -> Fake {
        Fake {
            config: Arc::new(config),
            forks: Arc::default(),
        }
    }
}

/// The identity of no real process, given out once.
fn new_identity() -> ProcessIdentity {
    static NEXT: AtomicU32 = AtomicU32::new(FIRST_PID);
    let pid = NEXT.fetch_add(1, Ordering::Relaxed);
    ProcessIdentity {
        pid,
        start_ticks: u64::from(pid - FIRST_PID),
    }
}

#[async_trait]
impl Engine for Fake {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            branch: true,
            branch_writes_behind: self.config.write_behind,
            save_layer: true,
            network: false,
            keeps_connections: true,
        }
    }

    async fn compatibility(&self) -> Result<BTreeMap<String, String>, Error> {
        Ok(BTreeMap::from([("fake".to_owned(), "1".to_owned())]))
    }

    fn difference(
        &self,
        recorded: &BTreeMap<String, String>,
        here: &BTreeMap<String, String>,
    ) -> Option<String> {
        let differ = || format!("it was made with {recorded:?}, here is {here:?}");
        (recorded != here).then(differ)
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, Error> {
        if self.config.fail_boot {
            return Err(wanted("boot"));
        }
        let size = spec.machine.memory_mib << 20;
        let (ram, run_dir) = (spec.memory_file, spec.run_dir.clone());
        blocking::run(move || {
            image::create(&ram, size)?;
            vm::begin_console(&run_dir, "booted")
        })
        .await?;
        let config = Arc::clone(&self.config);
        let vm = FakeVm::start(config, spec.machine, &spec.run_dir, State::default(), None);
        vm.wake_after(self.config.boot_delay);
        Ok(vm)
    }

    async fn template(&self, spec: TemplateSpec) -> Result<Arc<dyn Template>, Error> {
        let (config, forks) = (Arc::clone(&self.config), Arc::clone(&self.forks));
        let template = blocking::run(move || {
            image::check_state(&spec.files.state, &spec.machine)?;
            let ram = image::load(&spec.files, spec.machine.memory_mib << 20)?;
            let state = image::parse(&ram, &spec.files.memory)?;
            Ok(FakeTemplate {
                config,
                forks,
                machine: spec.machine,
                base: Base {
                    id: spec.id.into(),
                    ram: Arc::new(ram),
                },
                state,
                writes: None,
            })
        });
        Ok(Arc::new(template.await?))
    }

    async fn adopt(
        &self,
        _: ProcessIdentity,
        _: &str,
        _: &Path,
    ) -> Result<Option<Arc<dyn Vm>>, Error> {
        // Guests die with the process they live in.
        Ok(None)
    }
}

/// The snapshot on disk that a VM, or the first of its line, was forked from.
#[derive(Debug, Clone)]
struct Base {
    id: Arc<str>,
    ram: Arc<Vec<u8>>,
}

/// A template.
#[derive(Debug)]
struct FakeTemplate {
    config: Arc<FakeConfig>,
    forks: Arc<AtomicU64>,
    machine: MachineSpec,
    base: Base,
    state: State,
    /// Attempts to write it, where it is a branch.
    writes: Option<AtomicU32>,
}

impl FakeTemplate {
    async fn write_behind(&self, writes: &AtomicU32, spec: BranchSpec) -> Result<u64, Error> {
        tokio::time::sleep(self.config.save_delay).await;
        let attempt = writes.fetch_add(1, Ordering::Relaxed);
        if self.config.fail_save || attempt < self.config.fail_writes {
            let full = std::io::ErrorKind::StorageFull.into();
            return Err(image::failed("write", &spec.files.memory)(full));
        }
        let (ram, base) = (image::render(&self.state), Arc::clone(&self.base.ram));
        let machine = self.machine.clone();
        blocking::run(move || {
            let paths = [&spec.files.memory, &spec.files.index, &spec.state];
            image::refuse_existing(&paths)?;
            let size = machine.memory_mib << 20;
            let written = image::save_layer(&ram, &base, size, &spec.files).and_then(|bytes| {
                image::write_state(&spec.state, &machine)?;
                Ok(bytes)
            });
            written.inspect_err(|_| image::remove(&paths))
        })
        .await
    }

    async fn fork_one(&self, spec: ForkSpec) -> Result<Arc<dyn Vm>, Error> {
        let number = 1 + self.forks.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.config.fork_delay).await;
        let every = self.config.fail_fork_every;
        if every.is_some_and(|every| number.is_multiple_of(every)) {
            return Err(wanted("fork"));
        }
        vm::begin_console(&spec.run_dir, "forked")?;
        let base = Some(self.base.clone());
        let (config, machine) = (Arc::clone(&self.config), self.machine.clone());
        let vm = FakeVm::start(config, machine, &spec.run_dir, self.state.clone(), base);
        vm.wake_after(Duration::ZERO);
        Ok(vm)
    }
}

#[async_trait]
impl Template for FakeTemplate {
    fn identity(&self) -> Option<ProcessIdentity> {
        None
    }

    async fn fork(&self, specs: Vec<ForkSpec>) -> Vec<Result<Arc<dyn Vm>, Error>> {
        futures_util::future::join_all(specs.into_iter().map(|spec| self.fork_one(spec))).await
    }

    fn gives_users(&self) -> bool {
        self.writes.is_none() || !self.config.branches_keep_user
    }

    async fn write(&self, spec: BranchSpec) -> Result<u64, Error> {
        match &self.writes {
            Some(writes) => self.write_behind(writes, spec).await,
            None => Err(Error::Unsupported {
                engine: NAME,
                what: "write a template that is no branch",
            }),
        }
    }

    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// A failure that the configuration asks for.
fn wanted(step: &'static str) -> Error {
    Error::Control {
        step,
        detail: "the fake engine was told to fail".to_owned(),
    }
}
