//! Starting Firecracker: what it sees, where its console goes, how it is confined.

use std::fs::{self, DirBuilder, File};
use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_host::chain;
use forkd_host::process::root::{Lent, Root};
use forkd_host::process::{Confinement, Process, Spawn, Stdio, User};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;

use super::arguments::arguments;
use super::missing;
use super::names::{CONSOLE, CONSOLE_LOG, OWN};
use super::network::Place;
use super::process::Monitor;
use crate::child::{self, Guard};
use crate::jail::Walls;
use crate::output::Output;
use crate::rundir::{RunDir, failed};
use crate::statefile::{DEVICES_MAX, Shape};
use crate::{Error, Lifetime, SlotHandles, blocking, console};

/// For everybody to read.
const PUBLIC: u32 = 0o004;

/// A process to start.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) walls: Walls,
    /// Whom it runs as; as this process does if absent.
    pub(super) user: Option<User>,
    pub(super) id: String,
    pub(super) run_dir: PathBuf,
    pub(super) shape: Shape,
    /// Files it reads, and their names there.
    pub(super) files: Vec<(PathBuf, &'static str)>,
    pub(super) lifetime: Lifetime,
    pub(super) slot: SlotHandles,
}

/// A process that listens.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) run_dir: Arc<RunDir>,
    pub(super) monitor: Monitor,
    /// The name of its tap, where it has a network device.
    pub(super) tap: Option<String>,
}

/// Starts a process; answers when it listens.
pub(super) async fn start(plan: Plan) -> Result<Ready, Error> {
    let started = blocking::run(move || spawn(plan)).await?;
    let run_dir = Arc::new(started.run_dir);
    let output = Output::follow(started.stderr);
    let console = follow(started.console, &run_dir);
    let process = started.guard.disarm();
    let monitor = Monitor::attach(process, Arc::clone(&run_dir), output, console)?;
    monitor.listening().await?;
    Ok(Ready {
        run_dir,
        monitor,
        tap: started.tap,
    })
}

struct Started {
    run_dir: RunDir,
    guard: Guard,
    console: OwnedFd,
    stderr: PipeReader,
    tap: Option<String>,
}

fn spawn(mut plan: Plan) -> Result<Started, Error> {
    let run_dir = RunDir::open(&plan.run_dir)?;
    let user = plan.user.as_ref().map(|user| user.id);
    make_own(&run_dir.file(OWN), user)?;
    let (write, console) = make_console(&run_dir)?;
    let root = lay_out(&plan)?;
    let network = match plan.shape.network {
        true => {
            let place = Place::find(&mut plan.slot);
            Some(place.map_err(failed("make a network device for", &plan.run_dir))?)
        }
        false => None,
    };
    let (tap, netns) = match network {
        Some(place) => (Some(place.tap), place.netns),
        None => (None, plan.slot.netns.take()),
    };
    let program = plan.walls.program().to_owned();
    let (stderr, writer) = io::pipe().map_err(failed("pipe the output of", &program))?;
    let own_root = root.is_some();
    let file_bytes = plan.shape.memory_bytes().max(DEVICES_MAX);
    let confine = plan.walls.confinement(plan.user, file_bytes);
    let process = Process::spawn(Spawn {
        cwd: (!own_root).then_some(plan.run_dir),
        stdout: Stdio::Fd(write),
        stderr: Stdio::Fd(writer.into()),
        die_with_parent: plan.lifetime == Lifetime::DieWithParent,
        cgroup: plan.slot.cgroup,
        confine: confine.map(|confine| Confinement {
            root,
            given_network: netns.is_some(),
            ..confine
        }),
        netns,
        ..Spawn::new(&program, arguments(&plan.id))
    });
    let guard = Guard::new(process.map_err(|error| child::not_started(&program, error, missing))?);
    Ok(Started {
        run_dir,
        guard,
        console,
        stderr,
        tap,
    })
}

/// The directory that the VM makes its sockets in.
fn make_own(path: &Path, user: Option<u32>) -> Result<(), Error> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.map_err(failed("create", path))?;
    std::os::unix::fs::chown(path, user, user).map_err(failed("give away", path))
}

/// A pipe with a name, so that a later daemon finds it: the end for the VM, and the one to read. The VM can read it
/// too, so that it has no end while there is no daemon; and never waits for one that is slow.
fn make_console(run_dir: &RunDir) -> Result<(OwnedFd, OwnedFd), Error> {
    let path = run_dir.file(CONSOLE);
    let mode = Mode::RUSR | Mode::WUSR;
    let made = rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0);
    made.map_err(|errno| failed("create", &path)(errno.into()))?;
    let write = open_console(&path, OFlags::RDWR)?;
    Ok((write, open_console(&path, OFlags::RDONLY)?))
}

fn open_console(path: &Path, access: OFlags) -> Result<OwnedFd, Error> {
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    opened.map_err(|errno| failed("open", path)(errno.into()))
}

/// Opens the console of a VM that an earlier daemon started.
pub(super) fn reopen_console(run_dir: &RunDir) -> Result<OwnedFd, Error> {
    open_console(&run_dir.file(CONSOLE), OFlags::RDONLY)
}

/// Writes the console down. Answers when it has come to its end.
pub(super) fn follow(console: OwnedFd, run_dir: &RunDir) -> watch::Receiver<bool> {
    let log = run_dir.file(CONSOLE_LOG);
    let (tell, ended) = watch::channel(false);
    tokio::spawn(async move {
        match Receiver::from_owned_fd(console) {
            Ok(console) => console::pump(console, log).await,
            Err(error) => tracing::warn!(%error, "a VM's console cannot be read"),
        }
        tell.send_replace(true);
    });
    ended
}

/// Puts the VM's files where it will look for them: into a root of its own, or without a jail into its directory.
fn lay_out(plan: &Plan) -> Result<Option<Root>, Error> {
    let Some(shared) = plan.walls.root() else {
        for (file, name) in &plan.files {
            let link = plan.run_dir.join(name);
            std::os::unix::fs::symlink(file, &link).map_err(failed("link", &link))?;
        }
        return Ok(None);
    };
    for (file, _) in &plan.files {
        require_public(file)?;
    }
    let own = plan.run_dir.join(OWN);
    let files = plan.files.iter().map(|(file, name)| Lent {
        source: file,
        name,
        writable: false,
    });
    let own = Lent {
        source: &own,
        name: OWN,
        writable: true,
    };
    let lent: Vec<Lent<'_>> = files.chain([own]).collect();
    let root = shared.with(&lent).map_err(|error| Error::Control {
        step: "make a root for it",
        detail: chain(&error),
    })?;
    Ok(Some(root))
}

/// Whether everybody may read a file.
pub(super) fn is_public(file: &Path) -> Result<bool, Error> {
    let metadata = fs::metadata(file).map_err(failed("open", file))?;
    Ok(metadata.mode() & PUBLIC != 0)
}

/// Whatever this process's mask takes away: VMs run as other users. The directory is this process's own.
pub(super) fn make_public(file: &Path) -> Result<(), Error> {
    let mode = fs::Permissions::from_mode(0o444);
    fs::set_permissions(file, mode).map_err(failed("let VMs read", file))
}

/// The VM's user is nobody whom files are given to.
fn require_public(file: &Path) -> Result<(), Error> {
    if !is_public(file)? {
        let why = "users of VMs may not read it; allow that with chmod o+r, or start forkd with the umask 022";
        let denied = io::Error::new(io::ErrorKind::PermissionDenied, why);
        return Err(failed("give a VM", file)(denied));
    }
    // What cannot be opened here is not there either.
    File::open(file).map(drop).map_err(failed("open", file))
}
