//! A running VM of the monitor's.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use forkd_wire::vmm::{Reply, Request, State};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::sync::Mutex;

use super::branch;
use super::names::{CONSOLE_LOG, CONTROL, RECORD, SAVE_INDEX, VSOCK};
use super::persist::Record;
use super::process::{Monitor, strange};
use crate::rundir::{RunDir, failed};
use crate::{
    Branch, Error, Exit, GuestStream, Lifetime, ProcessIdentity, SaveMemory, SaveReport, SaveSpec,
    Vm, blocking, vsock,
};

/// How long an order to a VM may take.
pub(super) const ORDER_LIMIT: Duration = Duration::from_secs(30);
/// How long all of a large memory may take to be written to a slow disk.
pub(super) const WRITE_LIMIT: Duration = Duration::from_secs(600);
/// A later daemon that waits to be accepted, and one that has just gone.
const RENDEZVOUS_BACKLOG: i32 = 4;

/// What a VM has of its own on the host, made before its process.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) run_dir: PathBuf,
    pub(super) booted: bool,
    pub(super) vsock: OwnedFd,
    pub(super) console: File,
    /// Where a later daemon connects; for a VM that outlives this one.
    pub(super) rendezvous: Option<OwnedFd>,
}

impl Place {
    /// Makes sockets, console and record in a directory that is there. Blocks.
    pub(super) fn make(
        id: &str,
        run_dir: &Path,
        booted: bool,
        lifetime: Lifetime,
    ) -> Result<Place, Error> {
        let dir = RunDir::open(run_dir)?;
        let record = Record {
            id: id.to_owned(),
            booted,
        };
        crate::record::write(&dir.file(RECORD), &record)?;
        let vsock = dir.listen(VSOCK)?.into();
        let console = dir.file(CONSOLE_LOG);
        let created = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&console);
        let console = created.map_err(failed("create", &console))?;
        let rendezvous = match lifetime {
            Lifetime::Survive => Some(rendezvous(&dir)?),
            Lifetime::DieWithParent => None,
        };
        Ok(Place {
            run_dir: run_dir.to_owned(),
            booted,
            vsock,
            console,
            rendezvous,
        })
    }
}

fn seqpacket() -> rustix::io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)
}

fn rendezvous(dir: &RunDir) -> Result<OwnedFd, Error> {
    let make = || {
        let socket = seqpacket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(dir.short(CONTROL))?)?;
        rustix::net::listen(&socket, RENDEZVOUS_BACKLOG)?;
        Ok(socket)
    };
    make().map_err(|errno: rustix::io::Errno| failed("listen on", &dir.file(CONTROL))(errno.into()))
}

/// Connects to a VM that an earlier daemon left. Blocks, not for long: the queue is not full.
pub(super) fn reach(dir: &RunDir) -> std::io::Result<OwnedFd> {
    let socket = seqpacket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(dir.short(CONTROL))?)?;
    Ok(socket)
}

/// A VM.
#[derive(Debug)]
pub(super) struct KvmVm(Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) monitor: Monitor,
    pub(super) run_dir: PathBuf,
    pub(super) booted: bool,
    /// Pausing, resuming, saving and branching go one at a time.
    pub(super) turn: Mutex<()>,
}

impl KvmVm {
    /// Takes over a running process; from now on it lives until it is killed.
    pub(super) fn new(monitor: Monitor, place: Place) -> Arc<KvmVm> {
        KvmVm::adopted(monitor, place.run_dir, place.booted)
    }

    #[cfg(test)]
    pub(super) fn inner(&self) -> &Inner {
        &self.0
    }

    #[cfg(test)]
    pub(super) async fn branch_typed(&self) -> Result<branch::Born, Error> {
        branch::fork_off(&self.0).await
    }

    /// As [`KvmVm::new`], of what is known of an earlier daemon's VM.
    pub(super) fn adopted(monitor: Monitor, run_dir: PathBuf, booted: bool) -> Arc<KvmVm> {
        monitor.process.keep();
        Arc::new(KvmVm(Arc::new(Inner {
            monitor,
            run_dir,
            booted,
            turn: Mutex::new(()),
        })))
    }
}

#[async_trait]
impl Vm for KvmVm {
    fn identity(&self) -> ProcessIdentity {
        self.0.monitor.process.identity()
    }

    fn console(&self) -> PathBuf {
        self.0.run_dir.join(CONSOLE_LOG)
    }

    async fn pause(&self) -> Result<(), Error> {
        let _turn = self.0.turn.lock().await;
        self.0.order("pause", &Request::Pause).await.map(drop)
    }

    async fn resume(&self) -> Result<(), Error> {
        let _turn = self.0.turn.lock().await;
        self.0.order("resume", &Request::Resume).await.map(drop)
    }

    async fn save(&self, spec: SaveSpec) -> Result<SaveReport, Error> {
        let inner = Arc::clone(&self.0);
        // Or the guest would be left standing still.
        blocking::to_its_end("save", inner.save(spec)).await
    }

    async fn branch(&self) -> Result<Branch, Error> {
        let inner = Arc::clone(&self.0);
        // Or a template whose birth nobody hears of would be left over.
        let born = async move { branch::fork_off(&inner).await };
        let born = blocking::to_its_end("branch", born).await?;
        Ok(Branch {
            template: born.template,
            pause: born.pause,
            base: born.base,
        })
    }

    async fn dial(&self) -> Result<Box<dyn GuestStream>, Error> {
        self.0.monitor.process.check().await?;
        let dir = RunDir::open(&self.0.run_dir)?;
        let stream = vsock::dial(&self.0.monitor.process, &dir, VSOCK).await?;
        Ok(Box::new(stream))
    }

    async fn kill(&self) -> Result<(), Error> {
        self.0.monitor.process.kill().await
    }

    async fn exited(&self) -> Exit {
        self.0.monitor.process.exited().await
    }
}

impl Inner {
    pub(super) async fn order(
        &self,
        step: &'static str,
        request: &Request,
    ) -> Result<Reply, Error> {
        self.monitor.ask(step, request, &[], ORDER_LIMIT).await
    }

    async fn save(self: Arc<Self>, spec: SaveSpec) -> Result<SaveReport, Error> {
        match spec.memory {
            SaveMemory::Full(memory) => self.save_full(memory, spec.state).await,
            SaveMemory::Layer(layer) => branch::save_layer(&self, layer, spec.state).await,
        }
    }

    /// Writes everything while the guest stands still.
    async fn save_full(&self, memory: PathBuf, state: PathBuf) -> Result<SaveReport, Error> {
        let _turn = self.turn.lock().await;
        let index = self.run_dir.join(SAVE_INDEX);
        let paths = [memory, index.clone(), state];
        let pagemap = self.monitor.pagemap();
        let files = blocking::run(move || branch::Files::create(paths, &pagemap)).await?;
        let was_running = self.is_running().await?;
        let began = Instant::now();
        self.order("pause", &Request::Pause).await?;
        let saved = files.fill(&self.monitor, "save", &Request::Save).await;
        if was_running {
            self.order("resume", &Request::Resume).await?;
        }
        let pause = began.elapsed();
        let memory_bytes = files.finish(saved).await?;
        // The base of a later template is one piece; which pages are zero need not be told.
        let removed = blocking::run(move || std::fs::remove_file(&index)).await;
        if let Err(error) = removed {
            tracing::warn!(%error, "the index of a full save is left over");
        }
        Ok(SaveReport {
            pause,
            memory_bytes,
        })
    }

    async fn is_running(&self) -> Result<bool, Error> {
        match self
            .order("ask for the status of", &Request::Status)
            .await?
        {
            Reply::Status { state, .. } => Ok(state == State::Running),
            other => Err(strange("ask for the status of", &other)),
        }
    }
}
