//! A running VM of QEMU's.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::names::{AGENT, CONSOLE_LOG, DEVICES};
use super::persist::STATE;
use super::process::Monitor;
use super::request::{Command, Status};
use crate::channel::{self, Channel};
use crate::memory::{self, PrivateRam, Ram};
use crate::rundir::{RunDir, failed};
use crate::statefile::Shape;
use crate::{
    Error, Exit, GuestStream, ProcessIdentity, SaveMemory, SaveReport, SaveSpec, Vm, blocking, link,
};

/// How long a connection to the agent may wait for QEMU to accept those before it.
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// How often that is tried.
const DIAL_RETRY: Duration = Duration::from_millis(2);

/// A VM.
#[derive(Debug)]
pub(super) struct QemuVm(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    run_dir: RunDir,
    monitor: Monitor,
    shape: Shape,
    ram: Ram,
    /// Pausing, resuming and saving go one at a time.
    turn: Mutex<()>,
    /// The connection to the agent, while somebody has it.
    dialled: Mutex<Weak<UnixStream>>,
}

impl QemuVm {
    /// Takes over a running process; from now on it lives until it is killed.
    pub(super) fn new(run_dir: RunDir, monitor: Monitor, shape: Shape, ram: Ram) -> Arc<QemuVm> {
        monitor.process.keep();
        Arc::new(QemuVm(Arc::new(Inner {
            run_dir,
            monitor,
            shape,
            ram,
            turn: Mutex::new(()),
            dialled: Mutex::new(Weak::new()),
        })))
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn identity(&self) -> ProcessIdentity {
        self.0.monitor.process.identity()
    }

    fn console(&self) -> PathBuf {
        self.0.run_dir.file(CONSOLE_LOG)
    }

    async fn pause(&self) -> Result<(), Error> {
        let _turn = self.0.turn.lock().await;
        self.0.monitor.command(Command::Stop).await.map(|_| ())
    }

    async fn resume(&self) -> Result<(), Error> {
        let _turn = self.0.turn.lock().await;
        self.0.monitor.command(Command::Continue).await.map(|_| ())
    }

    async fn save(&self, spec: SaveSpec) -> Result<SaveReport, Error> {
        let inner = Arc::clone(&self.0);
        // Or the guest would be left standing still.
        blocking::to_its_end("save", inner.save(spec)).await
    }

    async fn dial(&self) -> Result<Box<dyn GuestStream>, Error> {
        let mut dialled = self.0.dialled.lock().await;
        if let Some(before) = dialled.upgrade() {
            // QEMU takes the next connection when this one has ended.
            channel::end(&before);
        }
        let stream = Arc::new(self.0.connect_agent().await?);
        *dialled = Arc::downgrade(&stream);
        Ok(Box::new(link::connect(Channel(stream))))
    }

    async fn kill(&self) -> Result<(), Error> {
        self.0.monitor.process.kill().await
    }

    async fn exited(&self) -> Exit {
        self.0.monitor.process.exited().await
    }
}

impl Inner {
    async fn connect_agent(&self) -> Result<UnixStream, Error> {
        let began = Instant::now();
        loop {
            self.monitor.process.check().await?;
            match self.run_dir.connect_later(AGENT).await {
                Ok(stream) => return Ok(stream),
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        && began.elapsed() < DIAL_LIMIT =>
                {
                    tokio::time::sleep(DIAL_RETRY).await;
                }
                Err(source) => {
                    self.monitor.process.check().await?;
                    return Err(failed("connect to", &self.run_dir.file(AGENT))(source));
                }
            }
        }
    }

    async fn save(self: Arc<Self>, spec: SaveSpec) -> Result<SaveReport, Error> {
        let _turn = self.turn.lock().await;
        let paths = paths_of(&spec);
        for path in &paths {
            if path.exists() {
                let exists = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(failed("save to", path)(exists));
            }
        }
        let saved = self.save_files(&spec).await;
        let devices = self.run_dir.file(DEVICES);
        blocking::run(move || {
            // Half a snapshot is none.
            let made = if saved.is_err() { paths } else { Vec::new() };
            for path in made.iter().chain([&devices]) {
                if let Err(error) = std::fs::remove_file(path)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, path = %path.display(), "file is left over");
                }
            }
            saved
        })
        .await
    }

    async fn save_files(self: &Arc<Self>, spec: &SaveSpec) -> Result<SaveReport, Error> {
        let prepared = self.prepare(&spec.memory).await?;
        let was_running = self.monitor.status().await? == Status::Running;
        let began = Instant::now();
        self.monitor.command(Command::Stop).await?;
        let frozen = self.save_frozen(&spec.memory, prepared).await;
        if was_running {
            self.monitor.command(Command::Continue).await?;
        }
        let pause = began.elapsed();
        let memory_bytes = frozen?;
        let (inner, state) = (Arc::clone(self), spec.state.clone());
        blocking::run(move || {
            let devices = inner.run_dir.file(DEVICES);
            STATE.write(&devices, &inner.shape, &state)
        })
        .await?;
        Ok(SaveReport {
            pause,
            memory_bytes,
        })
    }

    /// What can be done before the guest stands still: copying the base, which never changes.
    async fn prepare(&self, memory: &SaveMemory) -> Result<Option<(File, u64)>, Error> {
        match (&self.ram, memory) {
            (Ram::Private(base, from), SaveMemory::Full(to)) => {
                let (base, from, to) = (Arc::clone(base), from.clone(), to.clone());
                let copied = blocking::run(move || memory::copy_new(&base, &from, &to)).await;
                copied.map(Some)
            }
            (Ram::Shared(..), SaveMemory::Layer(_)) => Err(Error::Unsupported {
                engine: super::NAME,
                what: "save a machine that was booted, not forked, as a layer",
            }),
            _ => Ok(None),
        }
    }

    async fn save_frozen(
        self: &Arc<Self>,
        memory: &SaveMemory,
        prepared: Option<(File, u64)>,
    ) -> Result<u64, Error> {
        let devices = self.run_dir.file(DEVICES);
        let file = blocking::run(move || File::create(&devices).map_err(failed("make", &devices)));
        self.monitor.save_devices(file.await?).await?;
        let (inner, memory) = (Arc::clone(self), memory.clone());
        blocking::run(move || inner.save_memory(&memory, prepared)).await
    }

    fn save_memory(
        &self,
        memory: &SaveMemory,
        prepared: Option<(File, u64)>,
    ) -> Result<u64, Error> {
        let pid = self.monitor.process.identity().pid;
        match (&self.ram, memory, prepared) {
            (Ram::Shared(ram, from), SaveMemory::Full(to), _) => {
                memory::copy_new(ram, from, to).map(|(_, bytes)| bytes)
            }
            (Ram::Private(base, _), SaveMemory::Full(to), Some((copy, bytes))) => {
                let ram = PrivateRam::find(pid, base)?;
                ram.save_over(&copy, to).map(|written| bytes + written)
            }
            (Ram::Private(base, _), SaveMemory::Layer(files), _) => {
                PrivateRam::find(pid, base)?.save_layer(files)
            }
            _ => Err(Error::Unsupported {
                engine: super::NAME,
                what: "save this machine in this way",
            }),
        }
    }
}

/// The files a save makes.
fn paths_of(spec: &SaveSpec) -> Vec<PathBuf> {
    let mut paths = vec![spec.state.clone()];
    match &spec.memory {
        SaveMemory::Full(memory) => paths.push(memory.clone()),
        SaveMemory::Layer(files) => paths.extend([files.memory.clone(), files.index.clone()]),
    }
    paths
}
