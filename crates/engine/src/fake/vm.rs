//! A fake VM: a guest, its connection, its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use super::guest::{Guest, State};
use super::{Base, FakeConfig, FakeTemplate, agent, image, new_identity, wanted};
use crate::{
    Branch, Error, Exit, GuestStream, MachineSpec, ProcessIdentity, SaveMemory, SaveReport,
    SaveSpec, Vm, blocking,
};

const CONSOLE: &str = "console.log";
/// Bytes in flight on a connection, each way.
const CHANNEL: usize = 64 * 1024;

/// A VM.
#[derive(Debug)]
pub(super) struct FakeVm {
    config: Arc<FakeConfig>,
    identity: ProcessIdentity,
    machine: MachineSpec,
    console: PathBuf,
    guest: Arc<Guest>,
    /// What it was forked from; nothing for one that was booted.
    base: Option<Base>,
    /// Serves the agent's one connection.
    connection: Mutex<Option<AbortOnDropHandle<()>>>,
    /// Pausing, resuming and saving go one at a time.
    turn: Mutex<()>,
}

/// Writes the console's first line.
pub(super) fn begin_console(run_dir: &Path, how: &str) -> Result<(), Error> {
    let path = run_dir.join(CONSOLE);
    let text = format!("fake guest {how}\n");
    std::fs::write(&path, text).map_err(image::failed("write", &path))
}

impl FakeVm {
    pub(super) fn start(
        config: Arc<FakeConfig>,
        machine: MachineSpec,
        run_dir: &Path,
        state: State,
        base: Option<Base>,
    ) -> Arc<FakeVm> {
        Arc::new(FakeVm {
            config,
            identity: new_identity(),
            machine,
            console: run_dir.join(CONSOLE),
            guest: Arc::new(Guest::new(state)),
            base,
            connection: Mutex::default(),
            turn: Mutex::default(),
        })
    }

    /// Lets the guest run, after a while.
    pub(super) fn wake_after(self: &Arc<Self>, delay: Duration) {
        if delay.is_zero() {
            self.guest.set_running(true);
        } else {
            let guest = Arc::clone(&self.guest);
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                guest.set_running(true);
            });
        }
        if let Some(limit) = self.config.exit_after {
            let vm = Arc::downgrade(self);
            tokio::spawn(async move {
                tokio::time::sleep(limit).await;
                if let Some(vm) = vm.upgrade() {
                    vm.end(Exit::Signal(9)).await;
                }
            });
        }
    }

    /// Ends the VM, unless it has ended already.
    async fn end(&self, exit: Exit) {
        self.guest.end(exit);
        self.connection.lock().await.take();
    }

    fn check(&self) -> Result<(), Error> {
        match &*self.guest.exit.borrow() {
            None => Ok(()),
            Some(exit) => Err(Error::Exited {
                exit: format!("{exit:?}"),
                output: String::new(),
            }),
        }
    }

    async fn save_files(&self, spec: &SaveSpec) -> Result<u64, Error> {
        tokio::time::sleep(self.config.save_delay).await;
        if self.config.fail_save {
            return Err(wanted("save"));
        }
        let ram = image::render(&self.guest.state());
        let (spec, machine, base) = (spec.clone(), self.machine.clone(), self.base.clone());
        let size = machine.memory_mib << 20;
        blocking::run(move || {
            let bytes = match (&spec.memory, base) {
                (SaveMemory::Full(path), _) => image::save_full(&ram, size, path)?,
                (SaveMemory::Layer(files), Some(base)) => {
                    image::save_layer(&ram, &base.ram, size, files)?
                }
                (SaveMemory::Layer(_), None) => return Err(no_base()),
            };
            image::write_state(&spec.state, &machine)?;
            Ok(bytes)
        })
        .await
    }
}

#[async_trait]
impl Vm for FakeVm {
    fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    fn console(&self) -> PathBuf {
        self.console.clone()
    }

    async fn pause(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        self.check()?;
        self.guest.set_running(false);
        Ok(())
    }

    async fn resume(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        self.check()?;
        self.guest.set_running(true);
        Ok(())
    }

    async fn save(&self, spec: SaveSpec) -> Result<SaveReport, Error> {
        let _turn = self.turn.lock().await;
        self.check()?;
        let mut paths = vec![spec.state.clone()];
        match &spec.memory {
            SaveMemory::Full(memory) => paths.push(memory.clone()),
            SaveMemory::Layer(files) => paths.extend([files.memory.clone(), files.index.clone()]),
        }
        let paths: Vec<_> = paths.iter().collect();
        image::refuse_existing(&paths)?;
        let was_running = self.guest.is_running();
        let began = Instant::now();
        self.guest.set_running(false);
        let saved = self.save_files(&spec).await;
        self.guest.set_running(was_running);
        let memory_bytes = saved.inspect_err(|_| image::remove(&paths))?;
        Ok(SaveReport {
            pause: began.elapsed(),
            memory_bytes,
        })
    }

    async fn branch(&self) -> Result<Branch, Error> {
        if !self.config.write_behind {
            return Err(Error::Unsupported {
                engine: super::NAME,
                what: "fork a branch before it is written",
            });
        }
        let _turn = self.turn.lock().await;
        self.check()?;
        let began = Instant::now();
        let base = self.base.clone().ok_or_else(no_base)?;
        let id = base.id.to_string();
        let template = FakeTemplate {
            config: Arc::clone(&self.config),
            forks: Arc::default(),
            machine: self.machine.clone(),
            base,
            state: self.guest.state().clone(),
            writes: Some(AtomicU32::new(0)),
        };
        Ok(Branch {
            template: Arc::new(template),
            pause: began.elapsed(),
            base: id,
        })
    }

    async fn dial(&self) -> Result<Box<dyn GuestStream>, Error> {
        let mut connection = self.connection.lock().await;
        self.check()?;
        let (ours, theirs) = tokio::io::duplex(CHANNEL);
        let (guest, mute) = (Arc::clone(&self.guest), self.config.mute);
        let serve = tokio::spawn(async move {
            let served = agent::serve(Arc::clone(&guest), theirs, mute);
            tokio::select! {
                () = served => {}
                _ = guest.ended() => {}
            }
        });
        *connection = Some(AbortOnDropHandle::new(serve));
        Ok(Box::new(ours))
    }

    async fn kill(&self) -> Result<(), Error> {
        self.end(Exit::Signal(9)).await;
        Ok(())
    }

    async fn exited(&self) -> Exit {
        self.guest.ended().await
    }
}

fn no_base() -> Error {
    Error::Unsupported {
        engine: super::NAME,
        what: "save a machine that was booted, not forked, as a layer",
    }
}
