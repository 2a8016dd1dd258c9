//! A running VM of Firecracker's.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex, PoisonError, Weak};
use std::time::Instant;

use async_trait::async_trait;
use forkd_host::process::root::{Lent, Root};
use forkd_host::{chain, sparse};
use rustix::process::{Gid, Uid};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::launch::Ready;
use super::names::{CONSOLE_LOG, DEVICES, DUMP, VSOCK};
use super::persist::{Record, STATE};
use super::process::Monitor;
use super::request::{Extent, Request};
use crate::channel::{self, Channel};
use crate::memory::{self, PrivateRam};
use crate::rundir::{RunDir, failed};
use crate::{
    Error, Exit, GuestStream, ProcessIdentity, SaveMemory, SaveReport, SaveSpec, Vm, blocking,
    vsock,
};

/// A VM.
#[derive(Debug)]
pub(super) struct FirecrackerVm(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    run_dir: Arc<RunDir>,
    monitor: Monitor,
    record: Record,
    /// The file that RAM was mapped from, and its name; `None`: the VM was booted.
    base: Option<(Arc<File>, PathBuf)>,
    /// Pausing, resuming and saving go one at a time.
    turn: Mutex<()>,
    /// Connections to the agent, while somebody has them.
    dialled: StdMutex<Vec<Weak<UnixStream>>>,
}

impl FirecrackerVm {
    /// Takes over a running process; from now on it lives until it is killed.
    pub(super) fn new(
        ready: Ready,
        record: Record,
        base: Option<(Arc<File>, PathBuf)>,
    ) -> Arc<FirecrackerVm> {
        ready.monitor.process.keep();
        Arc::new(FirecrackerVm(Arc::new(Inner {
            run_dir: ready.run_dir,
            monitor: ready.monitor,
            record,
            base,
            turn: Mutex::new(()),
            dialled: StdMutex::default(),
        })))
    }
}

#[async_trait]
impl Vm for FirecrackerVm {
    fn identity(&self) -> ProcessIdentity {
        self.0.monitor.process.identity()
    }

    fn console(&self) -> PathBuf {
        self.0.run_dir.file(CONSOLE_LOG)
    }

    async fn pause(&self) -> Result<(), Error> {
        let _turn = self.0.turn.lock().await;
        self.0.monitor.ask(Request::Pause).await.map(drop)
    }

    async fn resume(&self) -> Result<(), Error> {
        let _turn = self.0.turn.lock().await;
        self.0.monitor.ask(Request::Resume).await.map(drop)
    }

    async fn save(&self, spec: SaveSpec) -> Result<SaveReport, Error> {
        let inner = Arc::clone(&self.0);
        // Or the guest would be left standing still.
        blocking::to_its_end("save", inner.save(spec)).await
    }

    async fn dial(&self) -> Result<Box<dyn GuestStream>, Error> {
        let inner = &self.0;
        inner.monitor.process.check().await?;
        let stream = vsock::dial(&inner.monitor.process, &inner.run_dir, VSOCK).await?;
        Ok(Box::new(Channel(inner.keep(stream))))
    }

    async fn kill(&self) -> Result<(), Error> {
        self.0.monitor.process.kill().await
    }

    async fn exited(&self) -> Exit {
        self.0.monitor.process.exited().await
    }
}

impl Inner {
    /// Remembers a connection as long as somebody has it.
    fn keep(&self, stream: UnixStream) -> Arc<UnixStream> {
        let stream = Arc::new(stream);
        let mut dialled = self.dialled.lock().unwrap_or_else(PoisonError::into_inner);
        dialled.retain(|other| other.strong_count() > 0);
        dialled.push(Arc::downgrade(&stream));
        stream
    }

    /// When a VM is saved, Firecracker has the guest forget its connections, and does not tell those at the other
    /// end, who would wait for ever.
    fn end_connections(&self) {
        let mut dialled = self.dialled.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in dialled.drain(..).filter_map(|stream| stream.upgrade()) {
            channel::end(&stream);
        }
    }

    async fn save(self: Arc<Self>, spec: SaveSpec) -> Result<SaveReport, Error> {
        let _turn = self.turn.lock().await;
        let dump = dump_path(&spec.state);
        let paths = paths_of(&spec);
        for path in paths.iter().chain([&dump]) {
            if path.exists() {
                let exists = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(failed("save to", path)(exists));
            }
        }
        let saved = self.save_files(&spec, &dump).await;
        let devices = self.run_dir.file(DEVICES);
        blocking::run(move || {
            // Half a snapshot is none.
            let made = if saved.is_err() { paths } else { Vec::new() };
            for path in made.iter().chain([&devices, &dump]) {
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

    async fn save_files(
        self: &Arc<Self>,
        spec: &SaveSpec,
        dump: &Path,
    ) -> Result<SaveReport, Error> {
        let save = Save::prepare(self, spec, dump).await?;
        let was_running = self.monitor.is_running().await?;
        let began = Instant::now();
        self.monitor.ask(Request::Pause).await?;
        let frozen = self.save_frozen(&save).await;
        if was_running {
            self.monitor.ask(Request::Resume).await?;
        }
        let pause = began.elapsed();
        self.end_connections();
        let written = frozen?;
        let (inner, state) = (Arc::clone(self), spec.state.clone());
        let memory_bytes = blocking::run(move || {
            let devices = inner.run_dir.file(DEVICES);
            STATE.write(&devices, &inner.record.shape, &state)?;
            save.finish(written)
        })
        .await?;
        Ok(SaveReport {
            pause,
            memory_bytes,
        })
    }

    /// Answers the bytes of memory that were written besides what Firecracker wrote.
    async fn save_frozen(self: &Arc<Self>, save: &Save) -> Result<u64, Error> {
        let lent = self.lend(save).await?;
        let saved = self
            .monitor
            .ask(Request::Save(&lent, save.extent()))
            .await
            .map(drop);
        self.take_back(save).await?;
        saved?;
        let (inner, save) = (Arc::clone(self), save.clone());
        blocking::run(move || save.private_pages(&inner)).await
    }

    /// Lets the VM write a file. Answers its name there.
    async fn lend(&self, save: &Save) -> Result<PathBuf, Error> {
        let Some(user) = self.record.user else {
            return Ok(save.dump.clone());
        };
        let (file, path, pid) = (Arc::clone(&save.file), save.dump.clone(), self.pid());
        blocking::run(move || {
            give(&file, &path, user)?;
            let lent = Lent {
                source: &path,
                name: DUMP,
                writable: true,
            };
            let root = Root::of(pid).map_err(|error| not_lent(&error))?;
            root.lend(&lent).map_err(|error| not_lent(&error))
        })
        .await?;
        Ok(PathBuf::from(DUMP))
    }

    async fn take_back(&self, save: &Save) -> Result<(), Error> {
        if self.record.user.is_none() {
            return Ok(());
        }
        let (file, path, pid) = (Arc::clone(&save.file), save.dump.clone(), self.pid());
        blocking::run(move || {
            let root = Root::of(pid).map_err(|error| not_lent(&error))?;
            root.take_back(DUMP).map_err(|error| not_lent(&error))?;
            give(&file, &path, rustix::process::geteuid().as_raw())
        })
        .await
    }

    fn pid(&self) -> u32 {
        self.monitor.process.identity().pid
    }
}

/// A save that can begin.
#[derive(Debug, Clone)]
struct Save {
    memory: SaveMemory,
    /// What Firecracker writes memory to. Of a VM that was booted that is the snapshot's. Of a fork it is thrown away:
    /// it holds what was written since the last save, while wanted is what was since the fork, which the kernel
    /// knows.
    dump: PathBuf,
    file: Arc<File>,
    /// The base that a fork's pages are laid over, copied; and the bytes of it.
    copy: Option<(Arc<File>, u64)>,
    forked: bool,
}

impl Save {
    /// What can be done before the guest stands still: making files, copying the base, which never changes.
    async fn prepare(inner: &Inner, spec: &SaveSpec, dump: &Path) -> Result<Save, Error> {
        let size = inner.record.shape.memory_bytes();
        let (base, memory, dump) = (inner.base.clone(), spec.memory.clone(), dump.to_owned());
        let prepare = move || {
            let forked = base.is_some();
            let (dump, copy) = match (base, &memory) {
                (None, SaveMemory::Full(to)) => (to.clone(), None),
                (None, SaveMemory::Layer(_)) => {
                    return Err(Error::Unsupported {
                        engine: super::NAME,
                        what: "save a machine that was booted, not forked, as a layer",
                    });
                }
                (Some((base, from)), SaveMemory::Full(to)) => {
                    let (copy, bytes) = memory::copy_new(&base, &from, to)?;
                    (dump, Some((Arc::new(copy), bytes)))
                }
                (Some(_), SaveMemory::Layer(_)) => (dump, None),
            };
            // Of this size, it is not emptied before it is written.
            let file = Arc::new(memory::create(&dump, size)?);
            Ok(Save {
                memory,
                dump,
                file,
                copy,
                forked,
            })
        };
        blocking::run(prepare).await
    }

    fn extent(&self) -> Extent {
        match self.forked {
            true => Extent::Written,
            false => Extent::Full,
        }
    }

    /// Writes the pages of a fork that are its own. Blocks.
    fn private_pages(&self, inner: &Inner) -> Result<u64, Error> {
        let Some((base, _)) = &inner.base else {
            return Ok(0);
        };
        let ram = PrivateRam::find(inner.pid(), base)?;
        match (&self.memory, &self.copy) {
            (SaveMemory::Full(to), Some((copy, bytes))) => {
                ram.save_over(copy, to).map(|written| bytes + written)
            }
            (SaveMemory::Full(to), None) => Err(failed("open", to)(io::ErrorKind::NotFound.into())),
            (SaveMemory::Layer(files), _) => ram.save_layer(files),
        }
    }

    /// Answers the bytes of memory in the snapshot. Blocks.
    fn finish(&self, written: u64) -> Result<u64, Error> {
        if self.forked {
            return Ok(written);
        }
        // Firecracker writes what is zero, too.
        let punched = sparse::punch_zero_pages(&self.file);
        let left = punched.and_then(|_| sparse::allocated_bytes(&self.file));
        left.map_err(|error| failed("write", &self.dump)(io::Error::other(error)))
    }
}

fn give(file: &File, path: &Path, user: u32) -> Result<(), Error> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    let given = rustix::fs::fchown(file, Some(uid), Some(gid));
    given.map_err(|errno| failed("give away", path)(errno.into()))
}

fn not_lent(error: &forkd_host::process::root::Error) -> Error {
    Error::Control {
        step: "lend it a file",
        detail: chain(error),
    }
}

/// Beside the snapshot: it may be large, and is on a disk there.
fn dump_path(state: &Path) -> PathBuf {
    state.with_extension("dump")
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
