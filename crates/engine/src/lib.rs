//! One trait over what runs a VM. Every VM is a process of its own; an engine boots one, freezes it
//! into files, and forks any number of copies from those files.
//!
//! ```text
//!   boot ──► Vm ──save──► files ──template──► Template ──fork──► Vm, Vm, Vm …
//!             └────────────────branch (running) ──────► Template + files written behind
//! ```
//!
//! This crate knows paths, processes and byte streams. It knows no tags, no store, no HTTP routes and no
//! agent messages. No type of QEMU's, Firecracker's or the built-in monitor's leaves its module.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

mod blocking;
mod channel;
mod child;
mod console;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
mod error;
mod facts;
pub mod fake;
mod fd;
pub mod firecracker;
mod jail;
pub mod kvm;
pub mod link;
mod memory;
mod output;
pub mod qemu;
mod record;
mod rundir;
pub mod select;
mod statefile;
#[cfg(test)]
mod test_image;
mod vsock;

pub use error::Error;

/// A connection to the guest's agent, ready for HTTP.
pub trait GuestStream: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug> GuestStream for T {}

/// What an engine can do; asked before a request is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// A running VM can be frozen into a new snapshot.
    pub branch: bool,
    /// A branch can be forked before its files are written.
    pub branch_writes_behind: bool,
    /// A save can write only the pages that differ from the base.
    pub save_layer: bool,
    /// The guest has a network device.
    pub network: bool,
    /// Connections to the agent live on when the VM is saved. Otherwise a save ends them: they are to be made
    /// anew.
    pub keeps_connections: bool,
}

/// What to boot. Checked by the caller: the files exist, the numbers are in range.
#[derive(Debug)]
pub struct BootSpec {
    /// Names the VM's processes and files; unique on the node.
    pub id: String,
    /// A directory of this VM's own for sockets and the console; made by the caller, removed by him
    /// after the VM is gone.
    pub run_dir: PathBuf,
    /// The machine.
    pub machine: MachineSpec,
    /// Where the guest's RAM is to live, so that a later full save need not copy it. The file must
    /// not exist yet.
    pub memory_file: PathBuf,
    /// Whether the VM dies with this process.
    pub lifetime: Lifetime,
    /// The prepared host resources the VM is put into.
    pub slot: Option<SlotHandles>,
}

/// The machine a guest sees. A snapshot keeps it, because every fork must see the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    /// Number of virtual CPUs, 1..=32.
    pub vcpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Linux kernel, bzImage or vmlinux.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: PathBuf,
    /// Read-only root disk.
    pub rootfs: PathBuf,
    /// Appended to the engine's own kernel command line.
    pub cmdline: String,
    /// Whether the guest has a network device.
    pub network: bool,
}

/// Whether a VM outlives the process that started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// The VM goes on when the daemon ends, to be adopted by the next one.
    Survive,
    /// The kernel kills the VM when this process ends, however it ends.
    DieWithParent,
}

/// The files of a frozen machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFiles {
    /// The base image of RAM: sparse, a hole is zero.
    pub memory: PathBuf,
    /// Layers over the base, oldest first; each holds only pages that differ from what is below it.
    pub layers: Vec<LayerFiles>,
    /// Device and CPU state; opaque to everybody but the engine that wrote it.
    pub state: PathBuf,
}

/// One layer of differing pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFiles {
    /// Sparse file; pages stand at their own guest offset.
    pub memory: PathBuf,
    /// Which extents the layer holds, and which of them are zero.
    pub index: PathBuf,
}

/// What a template needs.
#[derive(Debug, Clone)]
pub struct TemplateSpec {
    /// Names the template's process and files; unique on the node.
    pub id: String,
    /// A directory of the template's own, made and removed by the caller.
    pub run_dir: PathBuf,
    /// The machine that was frozen.
    pub machine: MachineSpec,
    /// Its files.
    pub files: SnapshotFiles,
    /// Whether the template dies with this process.
    pub lifetime: Lifetime,
}

/// One fork to be made.
#[derive(Debug)]
pub struct ForkSpec {
    /// Names the VM's process and files; unique on the node.
    pub id: String,
    /// A directory of this VM's own, as in [`BootSpec::run_dir`].
    pub run_dir: PathBuf,
    /// Whether the VM dies with this process.
    pub lifetime: Lifetime,
    /// The prepared host resources the VM is put into.
    pub slot: Option<SlotHandles>,
}

/// Handles of host resources a VM may use.
#[derive(Debug)]
pub struct SlotHandles {
    /// The cgroup leaf, opened as a directory.
    pub cgroup: Option<std::os::fd::OwnedFd>,
    /// The tap device, attached.
    pub tap: Option<std::os::fd::OwnedFd>,
    /// The tap device's name in `netns`, where nobody has attached it; instead of `tap`, for an engine that
    /// [opens taps](Engine::opens_taps).
    pub tap_name: Option<String>,
    /// Network namespace to run in. A VM in a jail whose tap is open already runs in an empty one of its own
    /// instead: whatever else is in that namespace is not for it to reach.
    pub netns: Option<std::os::fd::OwnedFd>,
    /// User and group id to run as.
    pub uid: Option<u32>,
}

impl SlotHandles {
    /// No host resources of its own.
    pub const NONE: SlotHandles = SlotHandles {
        cgroup: None,
        tap: None,
        tap_name: None,
        netns: None,
        uid: None,
    };
}

/// Whether a layer of isolation is in force on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Enforcement {
    /// It is.
    Enforced,
    /// It is not.
    NotEnforced {
        /// Why not, and what would help.
        why: String,
    },
}

/// How to find a VM's process again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of `/proc/<pid>/stat`; tells a reused pid.
    pub start_ticks: u64,
}

/// What a save is to write, and where. None of the files may exist yet.
#[derive(Debug, Clone)]
pub struct SaveSpec {
    /// RAM.
    pub memory: SaveMemory,
    /// Device and CPU state.
    pub state: PathBuf,
}

/// How RAM is saved.
#[derive(Debug, Clone)]
pub enum SaveMemory {
    /// All of RAM into one sparse file.
    Full(PathBuf),
    /// Only what differs from the snapshot the VM was forked from.
    Layer(LayerFiles),
}

/// What a save did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SaveReport {
    /// How long the guest stood still.
    pub pause: std::time::Duration,
    /// Bytes of RAM written.
    pub memory_bytes: u64,
}

/// What a branch is to write, and where. None of the files may exist yet.
#[derive(Debug, Clone)]
pub struct BranchSpec {
    /// RAM: what differs from the base that [`Branch::base`] names.
    pub files: LayerFiles,
    /// Device and CPU state.
    pub state: PathBuf,
}

/// A VM that was frozen while it goes on.
#[derive(Debug)]
pub struct Branch {
    /// Can be forked at once, whatever becomes of the files that [`Template::write`] is asked for.
    pub template: Arc<dyn Template>,
    /// How long the guest stood still.
    pub pause: std::time::Duration,
    /// [`TemplateSpec::id`] of the snapshot that the written layer lies over: the one on disk that the
    /// VM, or the first of its line, was forked from.
    pub base: String,
}

/// How a VM's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It left with a status; 0 is a clean shutdown of the guest.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// The guest reset its machine: its kernel panicked, or it rebooted. The console says why.
    Reset,
    /// It is gone, and nobody can say how: it was adopted, or reaped elsewhere.
    Unknown,
}

/// Runs VMs of one kind.
#[async_trait]
pub trait Engine: Send + Sync + fmt::Debug {
    /// `qemu`, `kvm`, `firecracker` or `fake`.
    fn name(&self) -> &'static str;

    /// What this engine can do.
    fn capabilities(&self) -> Capabilities;

    /// Facts that a snapshot made here depends on, such as the program's version and the CPU model. A
    /// template is refused where they differ in a way the engine cannot bridge.
    async fn compatibility(&self) -> Result<BTreeMap<String, String>, Error>;

    /// What of the facts that were recorded cannot be bridged `here`, for the user.
    fn difference(
        &self,
        recorded: &BTreeMap<String, String>,
        here: &BTreeMap<String, String>,
    ) -> Option<String>;

    /// Checks recorded facts against this host.
    async fn check_compatibility(&self, recorded: &BTreeMap<String, String>) -> Result<(), Error> {
        let here = self.compatibility().await?;
        match self.difference(recorded, &here) {
            Some(difference) => Err(Error::Incompatible { difference }),
            None => Ok(()),
        }
    }

    /// The layers of isolation that VMs of this engine are put into, each with whether this host can
    /// enforce it. Limits and networks are the slots', and not told here.
    async fn enforcement(&self) -> Vec<(&'static str, Enforcement)> {
        Vec::new()
    }

    /// Whether its VMs open their tap themselves, by name and in the network namespace of their slot. Nobody else
    /// may have it attached then.
    fn opens_taps(&self) -> bool {
        false
    }

    /// Boots a machine. Returns when its process runs; the guest is not up yet.
    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, Error>;

    /// Makes a frozen machine ready to be forked.
    async fn template(&self, spec: TemplateSpec) -> Result<Arc<dyn Template>, Error>;

    /// Takes over a VM that an earlier daemon started, or says with `None` that it is gone.
    async fn adopt(
        &self,
        identity: ProcessIdentity,
        id: &str,
        run_dir: &Path,
    ) -> Result<Option<Arc<dyn Vm>>, Error>;
}

/// A frozen machine, ready to be forked on this node.
#[async_trait]
pub trait Template: Send + Sync + fmt::Debug {
    /// The template's own process, where it has one.
    fn identity(&self) -> Option<ProcessIdentity>;

    /// Forks. One result per spec, in order. Each VM runs when its result is there.
    async fn fork(&self, specs: Vec<ForkSpec>) -> Vec<Result<Arc<dyn Vm>, Error>>;

    /// Whether it can still be forked, as far as is known: false once its process has ended.
    fn is_alive(&self) -> bool {
        true
    }

    /// Whether forks run as the user of their slot. Forks of a branch may have to keep the user of the VM
    /// that was branched; a template of the written files is better then.
    fn gives_users(&self) -> bool {
        true
    }

    /// Writes the files of a branch and answers the bytes of RAM written. On failure nothing is left of
    /// the files. It may be asked for again, one after the other, after a failure or if files were lost.
    async fn write(&self, _: BranchSpec) -> Result<u64, Error> {
        Err(Error::Unsupported {
            engine: "chosen",
            what: "write a template that is no branch",
        })
    }

    /// Lets go of the template's process and files. VMs forked from it live on.
    async fn close(&self) -> Result<(), Error>;
}

/// A running VM.
#[async_trait]
pub trait Vm: Send + Sync + fmt::Debug {
    /// The VM's process.
    fn identity(&self) -> ProcessIdentity;

    /// The guest's console output, growing; bounded by the engine.
    fn console(&self) -> PathBuf;

    /// Stops the vCPUs. Idempotent.
    async fn pause(&self) -> Result<(), Error>;

    /// Lets the vCPUs go on. Idempotent.
    async fn resume(&self) -> Result<(), Error>;

    /// Freezes the VM into files. A VM that was running goes on, one that was paused stays paused.
    async fn save(&self, spec: SaveSpec) -> Result<SaveReport, Error>;

    /// Freezes the VM into a template that can be forked at once, and written afterwards. Only where
    /// [`Capabilities::branch_writes_behind`] says so.
    async fn branch(&self) -> Result<Branch, Error> {
        Err(Error::Unsupported {
            engine: "chosen",
            what: "fork a branch before it is written",
        })
    }

    /// Opens a connection to the agent. An engine may have only one at a time: then a new one ends
    /// the one before.
    async fn dial(&self) -> Result<Box<dyn GuestStream>, Error>;

    /// Kills the VM's process and waits until it is gone. Idempotent.
    async fn kill(&self) -> Result<(), Error>;

    /// Waits until the VM's process is gone.
    async fn exited(&self) -> Exit;
}
