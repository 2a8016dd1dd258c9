//! How a process of the monitor comes to be: a template loaded from disk, or a machine booted.
//!
//! Everything that needs a path, a privilege or the host's view is done here, once. Then the process
//! confines itself, and every fork inherits that for nothing.

mod linux;

use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use forkd_wire::layer::{self, Index};
use forkd_wire::vmm::{Reply, State};
use vm_memory::{Bytes, GuestAddress};

pub use linux::{LinuxGuest, Peripherals};

use crate::control::{Channel, failure};
use crate::controller::Controller;
use crate::host::Host;
use crate::machine::devices::{self, Devices};
use crate::machine::{self, Frozen, Machine};
use crate::memory::{self, Memory};
use crate::role::Role;
use crate::sandbox::{self, Sandbox};
use crate::state::{MachineState, file};
use crate::template::Template;
use crate::{boot, guest, jail, kvm, layers, seccomp, sys, vcpu, warm};

/// How to reach the controller and how far to confine the process.
#[derive(Debug, Clone)]
pub struct Process {
    /// Number of the inherited control socket.
    pub control_fd: RawFd,
    /// Number of an inherited listener for a later controller.
    pub rendezvous_fd: Option<RawFd>,
    /// Whether to enter an empty root.
    pub jail: bool,
    /// Whether to filter system calls.
    pub seccomp: bool,
}

/// A snapshot on disk.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its name: what branches of its forks are relative to.
    pub id: String,
    /// State file.
    pub state: PathBuf,
    /// Memory and index files of its layers, the lowest first.
    pub layers: Vec<(PathBuf, PathBuf)>,
    /// Its disks.
    pub disks: Vec<PathBuf>,
}

/// What to boot.
#[derive(Debug)]
pub enum Guest {
    /// The built-in test guest, with devices of a Linux guest if any are named.
    Test(Peripherals),
    /// A Linux kernel.
    Linux(Box<LinuxGuest>),
}

/// The size of a machine.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// RAM.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
}

/// Why a process could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control socket's number is wrong.
    #[error("descriptor {0} is not open: pass the number of an inherited socket above 2")]
    Fd(RawFd, #[source] std::io::Error),
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is far larger than it can be.
    #[error("{path} has more than {max} bytes, which no such file has")]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The limit.
        max: u64,
    },
    /// A layer's index is damaged.
    #[error("cannot use {path}: the snapshot is damaged, take or import it again")]
    Index {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: layer::Error,
    },
    /// The layers do not belong together.
    #[error(transparent)]
    Layers(#[from] layers::Error),
    /// The state file is damaged.
    #[error("cannot use {path}")]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: file::Error,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The machine cannot be built.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The machine does not start.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// A device cannot be made.
    #[error(transparent)]
    Devices(#[from] devices::Error),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Boot(#[from] boot::machine::Error),
    /// The guest's memory is too small for what is loaded.
    #[error("cannot load the guest into its memory: give the machine more")]
    Load(#[source] vm_memory::GuestMemoryError),
    /// A number of vCPUs that no machine has.
    #[error("a machine cannot have {0} vCPUs: choose 1 to 32")]
    Vcpus(u32),
    /// The process cannot be confined.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// The process cannot be confined.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    /// Signals cannot be set up.
    #[error("cannot set up the signal that interrupts vCPUs")]
    Signal(#[source] vmm_sys_util::errno::Error),
}

/// Loads a snapshot and serves forks of it. Failures are told to the controller, and to the caller
/// as the exit code.
pub fn template(process: &Process, snapshot: &Snapshot) -> Result<Role, Error> {
    let start = Instant::now();
    with_controller(process, &[], |controller| {
        let template = load(process, snapshot, controller)?;
        template.announce(start);
        Ok(Role::Template(Box::new(template)))
    })
}

/// Loads a snapshot for the benchmark's floor, unconfined.
pub fn load_bare(process: &Process, snapshot: &Snapshot) -> Result<Template, Error> {
    let control = sys::inherited_fd(process.control_fd);
    let control = control.map_err(|e| Error::Fd(process.control_fd, e))?;
    let process = Process {
        jail: false,
        seccomp: false,
        ..process.clone()
    };
    let mut controller = Controller::new(Channel::from(control), None);
    load(&process, snapshot, &mut controller)
}

/// Boots a machine and serves it.
pub fn boot(process: &Process, size: Size, guest: Guest) -> Result<Role, Error> {
    let peripherals = match &guest {
        Guest::Test(peripherals) => peripherals,
        Guest::Linux(linux) => &linux.peripherals,
    };
    with_controller(process, &peripherals.descriptors(), |controller| {
        let sandbox = boot_machine(process, size, guest, controller)?;
        Ok(Role::Sandbox(Box::new(sandbox)))
    })
}

fn with_controller(
    process: &Process,
    devices: &[RawFd],
    run: impl FnOnce(&mut Controller) -> Result<Role, Error>,
) -> Result<Role, Error> {
    let named = [Some(process.control_fd), process.rendezvous_fd];
    let mut keep = [&named.into_iter().flatten().collect::<Vec<_>>(), devices].concat();
    // Whatever else the program was started with would be inherited by every sandbox.
    sys::close_all_except(&mut keep);
    let take = |number| sys::inherited_fd(number).map_err(|e| Error::Fd(number, e));
    let control = take(process.control_fd)?;
    let rendezvous = process.rendezvous_fd.map(take).transpose()?;
    let mut controller = Controller::new(Channel::from(control), rendezvous);
    let channel = controller.channel().cloned();
    run(&mut controller).inspect_err(|error| {
        if let Some(channel) = channel {
            // A controller that is gone cannot be told; the exit code and stderr remain.
            _ = channel.reply(0, &Reply::Failed(failure(error)), &[]);
        }
    })
}

fn load(
    process: &Process,
    snapshot: &Snapshot,
    controller: &mut Controller,
) -> Result<Template, Error> {
    sys::one_malloc_arena();
    vcpu::install_kick_handler().map_err(Error::Signal)?;
    let host = Host::open()?;
    let state = read_capped(&snapshot.state, file::BYTES_MAX)?;
    let state = MachineState::decode(&state).map_err(|source| Error::State {
        path: snapshot.state.clone(),
        source,
    })?;
    let memory = load_memory(snapshot)?;
    let disks = open_disks(&snapshot.disks)?;
    warm::forget();
    let frozen = Frozen::rehearse(&host, &memory, state)?;
    let template = Template {
        host: Arc::new(host),
        memory: Arc::new(memory),
        frozen: Arc::new(frozen),
        base: snapshot.id.clone(),
        disks: Arc::new(disks),
        controller: controller.take(),
        born: false,
        state: State::Ready,
        write_error: String::new(),
        forks: 0,
        writer: None,
    };
    vcpu::rehearse_threads(template.frozen.vcpus());
    warm::up();
    confine(process)?;
    Ok(template)
}

fn load_memory(snapshot: &Snapshot) -> Result<Memory, Error> {
    let mut indexes = Vec::with_capacity(snapshot.layers.len());
    let mut files = Vec::with_capacity(snapshot.layers.len());
    for (memory, index) in &snapshot.layers {
        let bytes = read_capped(index, Index::encoded_len_max(layer::MEMORY_BYTES_MAX))?;
        let decoded = Index::decode(&bytes);
        indexes.push(decoded.map_err(|source| Error::Index {
            path: index.clone(),
            source,
        })?);
        files.push(open(memory)?);
    }
    let segments = layers::compose(&indexes)?;
    Ok(Memory::layered(
        indexes[0].memory_bytes(),
        &segments,
        &files,
    )?)
}

fn boot_machine(
    process: &Process,
    size: Size,
    guest: Guest,
    controller: &mut Controller,
) -> Result<Sandbox, Error> {
    sys::one_malloc_arena();
    vcpu::install_kick_handler().map_err(Error::Signal)?;
    if !(1..=file::VCPUS_MAX).contains(&size.vcpus) {
        return Err(Error::Vcpus(size.vcpus));
    }
    let host = Arc::new(Host::open()?);
    let memory = Arc::new(Memory::anonymous(size.memory_mib)?);
    let (machine, disks) = match guest {
        Guest::Test(peripherals) => test_machine(&host, &memory, size, controller, &peripherals)?,
        Guest::Linux(linux) => linux.build(&host, &memory, size, controller)?,
    };
    warm::up();
    confine(process)?;
    Ok(Sandbox::boot(machine, controller.take(), Arc::new(disks))?)
}

fn test_machine(
    host: &Arc<Host>,
    memory: &Arc<Memory>,
    size: Size,
    controller: &Controller,
    peripherals: &Peripherals,
) -> Result<(Machine, Vec<File>), Error> {
    write(memory, &guest::program(), guest::LOAD_ADDRESS)?;
    for other in 0..u64::from(size.vcpus) - 1 {
        // A guest too small for all of them cannot start the last ones.
        let page = u64::from(guest::SECOND_PAGE) + other;
        _ = write(memory, &guest::second_program(), page * memory::PAGE);
    }
    let cpuid = host.cpuid();
    let disks = open_disks(&peripherals.disks)?;
    let plan = peripherals.plan();
    let resources = peripherals.resources(controller, &disks)?;
    let devices = |vm: &_, exit: &_| match plan {
        Some(plan) => Devices::test_with(plan, resources, vm, memory, exit),
        None => Devices::test(resources.control),
    };
    let set_up = |number, fd: &kvm_ioctls::VcpuFd| {
        fd.set_cpuid2(&cpuid)
            .map_err(kvm::failed("set the CPUID"))?;
        // The other vCPUs wait until the test guest starts them.
        if number == 0 {
            guest::set_up(fd)
        } else {
            Ok(())
        }
    };
    let machine = Machine::fresh(host, memory, size.vcpus as usize, devices, set_up)?;
    Ok((machine, disks))
}

fn write(memory: &Memory, bytes: &[u8], at: u64) -> Result<(), Error> {
    let written = memory.guest().write_slice(bytes, GuestAddress(at));
    written.map_err(Error::Load)
}

fn confine(process: &Process) -> Result<(), Error> {
    if process.jail {
        jail::enter_empty_root()?;
    }
    if process.seccomp {
        seccomp::confine_main()?;
    }
    Ok(())
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

fn open_disks(paths: &[PathBuf]) -> Result<Vec<File>, Error> {
    paths.iter().map(|path| open(path)).collect()
}

fn read_capped(path: &Path, max: u64) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let file = open(path)?;
    let len = file.metadata().map_err(failed)?.len();
    if len > max {
        return Err(Error::TooLarge {
            path: path.to_owned(),
            max,
        });
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(max).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
