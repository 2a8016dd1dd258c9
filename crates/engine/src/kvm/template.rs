//! A process of the monitor that VMs are forked from: loaded from files, or born of a branch.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use forkd_host::orphans;
use forkd_wire::layer::{Builder, Kind};
use forkd_wire::vmm::{Child, Failure, FdSet, Reply, Request};
use rustix::fs::{Mode, OFlags};
use tokio::sync::Semaphore;

use super::client;
use super::client::Ready;
use super::names::BASE_INDEX;
use super::process::{self, Hold, Launch, Monitor, Start, number, strange};
use super::program::PROGRAM;
use super::vm::{KvmVm, Place};
use super::{arguments, branch, refuse};
use crate::output::Output;
use crate::rundir::failed;
use crate::{
    BranchSpec, Error, ForkSpec, Lifetime, MachineSpec, ProcessIdentity, SlotHandles,
    SnapshotFiles, Template, TemplateSpec, Vm, blocking,
};

/// How long a template may take to load; scattered layers are copied together then.
const LOAD_LIMIT: Duration = Duration::from_secs(120);
/// How long a fork may take to run, on a host with far more VMs than cores.
const FORK_LIMIT: Duration = Duration::from_secs(60);
/// How long an order to a running VM may take.
const ORDER_LIMIT: Duration = Duration::from_secs(30);
/// Forks that a template is asked for at once: what is on its way counts against the kernel's limit
/// of descriptors in flight, and the template makes one after the other anyway.
const FORKS_AT_ONCE: usize = 32;

/// A template.
#[derive(Debug)]
pub(super) struct KvmTemplate {
    monitor: Monitor,
    privileged: bool,
    /// Whether forks become users of their own.
    jail: bool,
    gate: Semaphore,
}

impl KvmTemplate {
    /// Starts a process that loads a snapshot.
    pub(super) async fn load(
        spec: TemplateSpec,
        program: PathBuf,
        jail: bool,
    ) -> Result<KvmTemplate, Error> {
        let (spec, index) = blocking::run(move || {
            check_files(&spec.files, &spec.machine)?;
            let index = write_base_index(&spec.run_dir, &spec.machine)?;
            Ok::<_, Error>((spec, index))
        })
        .await?;
        let started = start(&spec, &index, program, jail).await;
        // It is read once, or never.
        let left = blocking::run(move || std::fs::remove_file(&index)).await;
        if let Err(error) = left {
            tracing::debug!(%error, "the index of a base is left over");
        }
        let (monitor, ready) = started?;
        let (wanted, state) = (&spec.machine, &spec.files.state);
        if u64::from(ready.memory_mib) != wanted.memory_mib || ready.vcpus != wanted.vcpus {
            return Err(Error::Snapshot {
                path: state.clone(),
                problem: format!(
                    "it is of a machine with {} vCPUs and {} MiB of memory, wanted is one with {} and {}; \
                     make the snapshot anew",
                    ready.vcpus, ready.memory_mib, wanted.vcpus, wanted.memory_mib
                ),
            });
        }
        Ok(KvmTemplate::new(monitor, ready, jail))
    }

    fn new(monitor: Monitor, ready: Ready, jail: bool) -> KvmTemplate {
        KvmTemplate {
            monitor,
            privileged: ready.privileged,
            jail,
            gate: Semaphore::new(FORKS_AT_ONCE),
        }
    }

    /// Takes over a process that was branched off a VM.
    pub(super) async fn born(pid: u32, control: OwnedFd) -> Result<KvmTemplate, Error> {
        let process = process::own(pid)?;
        blocking::run(move || process::join_own_group(pid)).await;
        let monitor = Monitor::attach(process, control, Output::lost(), Hold::Tied)?;
        let step = "become a template";
        match monitor.ready(step, LOAD_LIMIT).await {
            Ok(ready) => Ok(KvmTemplate::new(monitor, ready, true)),
            Err(Start::Error(error)) => Err(error),
            Err(Start::Failed(failure)) => Err(refused(step, failure)),
        }
    }

    pub(super) fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Forks one VM.
    pub(super) async fn fork_typed(&self, spec: ForkSpec) -> Result<Arc<KvmVm>, Error> {
        check_slot(spec.slot.as_ref())?;
        let gone = |_| Error::Control {
            step: "fork",
            detail: "the template is being closed".to_owned(),
        };
        let permit = self.gate.acquire().await.map_err(gone)?;
        let booted = false;
        let (id, run_dir, lifetime) = (spec.id, spec.run_dir, spec.lifetime);
        let (place_id, dir) = (id.clone(), run_dir.clone());
        let place = blocking::run(move || Place::make(&place_id, &dir, booted, lifetime)).await?;
        let forked = self.fork_into(&id, place, lifetime, spec.slot).await;
        drop(permit);
        match forked {
            Ok(vm) => Ok(vm),
            Err(error) => {
                // Of a process whose birth was not told nothing is known but what it holds open.
                let killed = blocking::run(move || orphans::kill_users(&run_dir, &[PROGRAM])).await;
                if let Err(error) = killed {
                    tracing::error!(%error, id, "a VM may have leaked");
                }
                Err(error)
            }
        }
    }

    async fn fork_into(
        &self,
        id: &str,
        place: Place,
        lifetime: Lifetime,
        slot: Option<SlotHandles>,
    ) -> Result<Arc<KvmVm>, Error> {
        let mut slot = slot.unwrap_or(SlotHandles::NONE);
        slot.uid = slot.uid.filter(|_| self.jail);
        let (ours, theirs) = client::pair().map_err(failed("make a socket for", &place.run_dir))?;
        // A template that may not do it leaves it to this process.
        let moved = (!self.privileged).then_some(()).and(slot.cgroup.as_ref());
        let birth = Birth::new(id, &theirs, &place, &slot, self.privileged);
        let (reply, paused) = (self.ask(&birth).await?, birth.paused);
        // Open here, it would hide the VM's end.
        drop(theirs);
        let pid = the_child(reply)?;
        let hold = match lifetime {
            Lifetime::DieWithParent => Hold::Tied,
            Lifetime::Survive => Hold::Free,
        };
        let monitor = Monitor::attach(process::own(pid)?, ours, Output::lost(), hold)?;
        monitor.running("start", FORK_LIMIT).await?;
        if let Some(cgroup) = moved {
            move_into(cgroup.as_fd(), pid)?;
        }
        if paused {
            let resumed = monitor.ask("start", &Request::Resume, &[], ORDER_LIMIT);
            resumed.await?;
        }
        Ok(KvmVm::new(monitor, place))
    }

    async fn ask(&self, birth: &Birth<'_>) -> Result<Reply, Error> {
        let request = Request::Fork {
            children: vec![birth.child.clone()],
        };
        self.monitor
            .ask("fork", &request, &birth.fds, FORK_LIMIT)
            .await
    }
}

/// One fork as the monitor is asked for it.
struct Birth<'a> {
    child: Child,
    fds: Vec<BorrowedFd<'a>>,
    paused: bool,
}

impl<'a> Birth<'a> {
    fn new(
        id: &str,
        control: &'a OwnedFd,
        place: &'a Place,
        slot: &'a SlotHandles,
        privileged: bool,
    ) -> Birth<'a> {
        let cgroup = slot.cgroup.as_ref().filter(|_| privileged);
        let paused = !privileged && slot.cgroup.is_some();
        // In the order of the bits.
        let wanted = [
            (FdSet::CONTROL, Some(control.as_fd())),
            (FdSet::CGROUP, cgroup.map(AsFd::as_fd)),
            (FdSet::TAP, slot.tap.as_ref().map(AsFd::as_fd)),
            (FdSet::VSOCK, Some(place.vsock.as_fd())),
            (FdSet::CONSOLE, Some(place.console.as_fd())),
            (
                FdSet::RENDEZVOUS,
                place.rendezvous.as_ref().map(AsFd::as_fd),
            ),
        ];
        let mut set = FdSet::default();
        let mut fds = Vec::with_capacity(wanted.len());
        for (bit, fd) in wanted {
            if let Some(fd) = fd {
                set = set.with(bit);
                fds.push(fd);
            }
        }
        // Children of a branch keep the user of the sandbox it was branched from.
        let user = slot.uid.filter(|_| privileged).map(|uid| (uid, uid));
        let child = Child {
            id: id.to_owned(),
            user,
            paused,
            fds: set,
        };
        Birth { child, fds, paused }
    }
}

fn the_child(reply: Reply) -> Result<u32, Error> {
    match reply {
        Reply::Forked(mut children) if children.len() == 1 => children
            .remove(0)
            .map_err(|failure| refused("fork", failure)),
        other => Err(strange("fork", &other)),
    }
}

fn move_into(cgroup: BorrowedFd<'_>, pid: u32) -> Result<(), Error> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let written = rustix::fs::openat(cgroup, c"cgroup.procs", flags, Mode::empty())
        .and_then(|procs| rustix::io::write(procs, pid.to_string().as_bytes()));
    let path = Path::new("cgroup.procs");
    written
        .map(drop)
        .map_err(|errno| failed("move a VM into its group with", path)(errno.into()))
}

async fn start(
    spec: &TemplateSpec,
    index: &Path,
    program: PathBuf,
    jail: bool,
) -> Result<(Monitor, Ready), Error> {
    let (ours, theirs) = client::pair().map_err(failed("make a socket for", &spec.run_dir))?;
    let files = &spec.files;
    let mut layers = vec![(files.memory.as_path(), index)];
    layers.extend(
        files
            .layers
            .iter()
            .map(|layer| (layer.memory.as_path(), layer.index.as_path())),
    );
    let control = number(&theirs);
    let args = arguments::template(
        &spec.id,
        &spec.machine,
        &files.state,
        &layers,
        control,
        jail,
    );
    let launch = Launch {
        program,
        args,
        ours,
        inherit: vec![theirs],
        // A template is of no use to another daemon.
        die_with_parent: true,
        cgroup: None,
    };
    let monitor = process::start(launch).await?;
    match monitor.ready("load the snapshot", LOAD_LIMIT).await {
        Ok(ready) => Ok((monitor, ready)),
        Err(Start::Error(error)) => Err(error),
        Err(Start::Failed(failure)) => Err(blame(files, failure)),
    }
}

/// The file that the monitor names is the one to blame.
fn blame(files: &SnapshotFiles, failure: Failure) -> Error {
    let all = [&files.state, &files.memory].into_iter();
    let layers = files.layers.iter().flat_map(|l| [&l.index, &l.memory]);
    let mut named = all
        .chain(layers)
        .filter(|path| failure.message.contains(&*path.to_string_lossy()));
    match named.next() {
        Some(path) => Error::Snapshot {
            path: path.clone(),
            problem: format!("{}; make the snapshot anew", failure.message),
        },
        None => refused("load the snapshot", failure),
    }
}

pub(super) fn refused(step: &'static str, failure: Failure) -> Error {
    Error::Control {
        step,
        detail: failure.message,
    }
}

/// Finds what is missing or cut before a process is started. Blocks.
fn check_files(files: &SnapshotFiles, machine: &MachineSpec) -> Result<(), Error> {
    File::open(&files.state).map_err(failed("open", &files.state))?;
    let size = machine.memory_mib << 20;
    check_memory(&files.memory, size)?;
    for layer in &files.layers {
        check_memory(&layer.memory, size)?;
        File::open(&layer.index).map_err(failed("open", &layer.index))?;
    }
    Ok(())
}

fn check_memory(path: &Path, size: u64) -> Result<(), Error> {
    if path.as_os_str().as_encoded_bytes().contains(&b',') {
        let comma = std::io::Error::other("the monitor cannot be given a path with a comma");
        return Err(failed("use", path)(comma));
    }
    let file = File::open(path).map_err(failed("open", path))?;
    let found = file.metadata().map_err(failed("open", path))?.len();
    if found == size {
        return Ok(());
    }
    Err(Error::Snapshot {
        path: path.to_owned(),
        problem: format!(
            "it has {found} bytes, the machine's memory {size}; make the snapshot anew"
        ),
    })
}

/// A base image is all of RAM in one piece: a hole reads as zero.
fn write_base_index(run_dir: &Path, machine: &MachineSpec) -> Result<PathBuf, Error> {
    let path = run_dir.join(BASE_INDEX);
    let size = machine.memory_mib << 20;
    let unusable = |error: forkd_wire::layer::Error| Error::Control {
        step: "describe the base image",
        detail: error.to_string(),
    };
    let mut index = Builder::new(size).map_err(unusable)?;
    index.push(0, size, Kind::Data).map_err(unusable)?;
    std::fs::write(&path, index.finish().encode()).map_err(failed("write", &path))?;
    Ok(path)
}

#[async_trait]
impl Template for KvmTemplate {
    fn identity(&self) -> Option<ProcessIdentity> {
        Some(self.monitor.process.identity())
    }

    fn is_alive(&self) -> bool {
        !self.monitor.process.has_ended()
    }

    async fn fork(&self, specs: Vec<ForkSpec>) -> Vec<Result<Arc<dyn Vm>, Error>> {
        let forks = specs.into_iter().map(|spec| async move {
            let vm = self.fork_typed(spec).await?;
            Ok(vm as Arc<dyn Vm>)
        });
        futures_util::future::join_all(forks).await
    }

    fn gives_users(&self) -> bool {
        self.privileged || !self.jail
    }

    async fn write(&self, spec: BranchSpec) -> Result<u64, Error> {
        branch::write(self, spec).await
    }

    async fn close(&self) -> Result<(), Error> {
        self.gate.close();
        self.monitor.process.kill().await
    }
}

/// What this engine refuses of a slot.
pub(super) fn check_slot(slot: Option<&SlotHandles>) -> Result<(), Error> {
    match slot {
        // The VM has a namespace of its own, with nothing in it but the tap it is given.
        Some(slot) if slot.netns.is_some() && slot.tap.is_none() => {
            Err(refuse("run a VM in a network namespace without a tap"))
        }
        _ => Ok(()),
    }
}
