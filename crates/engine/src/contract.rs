//! The contract that every engine keeps, as a suite of scenarios over the traits. An engine's tests make
//! a [`World`] and run [`check`]; where a scenario fails, it panics and says what was broken.
//!
//! Guests are real, or behave as if: what is asked of them goes through their agent.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a suite of tests, though other crates may run it"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::{
    BootSpec, BranchSpec, Engine, Error, ForkSpec, LayerFiles, Lifetime, MachineSpec, SaveMemory,
    SaveReport, SaveSpec, SnapshotFiles, Template, TemplateSpec, Vm,
};

mod agent;
mod behind;
mod branch;
mod damage;
mod fork;
mod life;

pub use agent::{Agent, ask_health};

/// Where the scenarios happen.
#[derive(Debug)]
pub struct World {
    engine: Arc<dyn Engine>,
    machine: MachineSpec,
    dir: PathBuf,
    patience: Duration,
    next: AtomicU32,
}

/// A snapshot that scenarios fork from.
#[derive(Debug)]
pub struct Frozen {
    pub(crate) files: SnapshotFiles,
}

/// What the snapshot's guest held when it was frozen.
const MARK: &str = "/tmp/mark";
const MARK_CONTENT: &[u8] = b"written before the freeze";

impl World {
    /// A world for this engine and machine, in an empty directory. Guests get `patience` to answer.
    pub fn new(
        engine: Arc<dyn Engine>,
        machine: MachineSpec,
        dir: &Path,
        patience: Duration,
    ) -> World {
        World {
            engine,
            machine,
            dir: dir.to_owned(),
            patience,
            next: AtomicU32::new(0),
        }
    }

    /// A name nobody has had, and a directory of that name.
    fn place(&self, kind: &str) -> (String, PathBuf) {
        let id = format!("{kind}{}", self.next.fetch_add(1, Ordering::Relaxed));
        let dir = self.dir.join(&id);
        std::fs::create_dir(&dir).unwrap();
        (id, dir)
    }

    pub(crate) fn fork_spec(&self) -> ForkSpec {
        let (id, run_dir) = self.place("fork");
        ForkSpec {
            id,
            run_dir,
            lifetime: Lifetime::DieWithParent,
            slot: None,
        }
    }

    async fn boot(&self) -> Arc<dyn Vm> {
        let (id, run_dir) = self.place("boot");
        let memory_file = run_dir.join("ram");
        let spec = BootSpec {
            id,
            run_dir,
            machine: self.machine.clone(),
            memory_file,
            lifetime: Lifetime::DieWithParent,
            slot: None,
        };
        self.engine.boot(spec).await.expect("boot")
    }

    /// Paths of a branch that is written behind.
    fn behind(&self) -> (BranchSpec, LayerFiles) {
        let (_, dir) = self.place("behind");
        let files = LayerFiles {
            memory: dir.join("memory.bin"),
            index: dir.join("layer.idx"),
        };
        let spec = BranchSpec {
            files: files.clone(),
            state: dir.join("state.bin"),
        };
        (spec, files)
    }

    pub(crate) async fn template(&self, files: SnapshotFiles) -> Result<Arc<dyn Template>, Error> {
        let (id, run_dir) = self.place("template");
        let spec = TemplateSpec {
            id,
            run_dir,
            machine: self.machine.clone(),
            files,
            lifetime: Lifetime::DieWithParent,
        };
        self.engine.template(spec).await
    }

    async fn fork_one(&self, template: &Arc<dyn Template>) -> Arc<dyn Vm> {
        let mut forks = template.fork(vec![self.fork_spec()]).await;
        assert_eq!(forks.len(), 1);
        forks.remove(0).expect("fork")
    }

    /// Paths of a full save.
    fn full(&self) -> (SaveSpec, SnapshotFiles) {
        let (_, dir) = self.place("full");
        let files = SnapshotFiles {
            memory: dir.join("memory.bin"),
            layers: vec![],
            state: dir.join("state.bin"),
        };
        let spec = SaveSpec {
            memory: SaveMemory::Full(files.memory.clone()),
            state: files.state.clone(),
        };
        (spec, files)
    }

    /// Paths of a save as a layer over `below`.
    fn layer(&self, below: &SnapshotFiles) -> (SaveSpec, SnapshotFiles) {
        let (_, dir) = self.place("layer");
        let layer = LayerFiles {
            memory: dir.join("memory.bin"),
            index: dir.join("layer.idx"),
        };
        let mut files = below.clone();
        files.layers.push(layer.clone());
        files.state = dir.join("state.bin");
        let spec = SaveSpec {
            memory: SaveMemory::Layer(layer),
            state: files.state.clone(),
        };
        (spec, files)
    }

    fn note(&self, what: &str, report: &SaveReport) {
        assert!(report.memory_bytes > 0);
        let (kib, pause) = (report.memory_bytes >> 10, report.pause);
        eprintln!("{}: {what}: {kib} KiB, pause {pause:?}", self.engine.name());
    }

    /// Waits until the guest answers, and opens a connection to it.
    pub(crate) async fn agent(&self, vm: &Arc<dyn Vm>) -> Agent {
        agent::reach(vm, self.patience).await
    }

    /// The connection to a guest that was saved and runs: the one it had, or a new one where a save ends it, which
    /// must be told.
    pub(crate) async fn agent_after_save(&self, vm: &Arc<dyn Vm>, agent: Agent) -> Agent {
        if self.engine.capabilities().keeps_connections {
            assert!(agent.answers().await, "the connection survives a save");
            return agent;
        }
        let asked = tokio::time::timeout(Duration::from_secs(5), agent.answers()).await;
        let told = asked.expect("the end of a connection is told");
        assert!(!told, "a save ends connections, says the engine");
        self.agent(vm).await
    }

    /// Boots a guest, has it write a mark, and freezes it.
    pub async fn freeze(&self) -> Frozen {
        let vm = self.boot().await;
        let agent = self.agent(&vm).await;
        agent.write(MARK, MARK_CONTENT).await;
        vm.pause().await.expect("pause");
        let (spec, files) = self.full();
        let report = vm.save(spec).await.expect("save");
        self.note("saved a booted machine", &report);
        vm.kill().await.expect("kill");
        Frozen { files }
    }
}

/// Runs every scenario; prints the time each took.
pub async fn check(world: &World) {
    let step = async |name: &str, began: Instant| {
        let millis = began.elapsed().as_millis();
        eprintln!("{}: {name}: {millis} ms", world.engine.name());
    };
    let mut began = Instant::now();
    let frozen = world.freeze().await;
    macro_rules! scenarios {
        ($($scenario:path),* $(,)?) => {$(
            began = Instant::now();
            $scenario(world, &frozen).await;
            step(stringify!($scenario), began).await;
        )*};
    }
    step("freeze", began).await;
    scenarios![
        fork::inherits_and_is_isolated,
        fork::one_answer_per_fork,
        fork::killing_one_leaves_the_others,
        life::pauses_and_resumes,
        life::a_new_connection_ends_the_one_before,
        life::a_killed_process_is_noticed,
        life::a_polite_shutdown_is_told,
        life::adopts_what_still_runs,
        life::a_saved_machine_goes_on,
        branch::layers_over_layers,
        branch::layer_and_full_save_agree,
        branch::a_booted_machine_goes_on_after_its_save,
        behind::a_branch_is_forked_before_it_is_written,
        behind::a_branch_outlives_its_sandbox_and_a_failed_write,
        damage::damaged_files_are_refused,
        damage::a_wrong_machine_is_refused,
        damage::existing_files_are_not_overwritten,
    ];
    let _ = began;
}
