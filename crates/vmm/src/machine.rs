//! One VM in this process: built fresh, or restored from a frozen one.
//!
//! ```text
//!   Frozen (state, prepared)  ──restore──►  Machine  ──start──►  Threads run it
//!            ▲                                 │
//!            └────────────── save ─────────────┘   (vCPUs parked, devices quiet)
//! ```

pub mod devices;

use std::sync::Arc;
use std::time::Instant;

use forkd_wire::vmm::Stages;
use kvm_ioctls::VmFd;

use crate::exit::ExitEvent;
use crate::host::{Host, tsc_khz};
use crate::kvm::{self, failed};
use crate::memory::Memory;
use crate::state::{
    MachineDescription, MachineState, NewVcpu, Prepared, Tsc, VcpuState, VmState, compat,
};
use crate::vcpu::{Gate, Shared, Threads, Vcpu};
use devices::{Devices, Resources};

/// Why a machine cannot be built, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// This host cannot go on with the frozen machine.
    #[error(transparent)]
    Compat(#[from] compat::Error),
    /// A device could not be made.
    #[error(transparent)]
    Devices(#[from] devices::Error),
    /// The state is for another amount of memory than the layers.
    #[error(
        "the state file is for a machine with {state} MiB, the memory layers hold {layers} MiB: they are not of one snapshot"
    )]
    MemorySize {
        /// MiB according to the state file.
        state: u32,
        /// MiB according to the layers.
        layers: u32,
    },
    /// No descriptors or no threads.
    #[error("cannot prepare the machine's threads")]
    Prepare(#[source] std::io::Error),
    /// A vCPU thread could not be started.
    #[error(transparent)]
    Threads(#[from] crate::vcpu::Error),
}

/// A frozen machine, ready to be restored any number of times.
#[derive(Debug)]
pub struct Frozen {
    description: MachineDescription,
    vm: VmState,
    vcpus: Vec<Prepared>,
    new_vcpu: Arc<NewVcpu>,
}

impl Frozen {
    /// Checks that this host can go on with the machine, by restoring it once into a VM that never
    /// runs: whatever the kernel would refuse is refused now, not when a sandbox is wanted.
    pub fn rehearse(host: &Host, memory: &Memory, state: MachineState) -> Result<Frozen, Error> {
        let (ours, theirs) = (memory.mib(), state.description.memory_mib);
        if ours != theirs {
            return Err(Error::MemorySize {
                state: theirs,
                layers: ours,
            });
        }
        compat::check(&state, &host.shown)?;
        let vm = kvm::create_vm(&host.kvm)?;
        // Some registers name guest memory, which must be there to be accepted.
        kvm::add_memory(&vm, memory)?;
        kvm::add_irqchip(&vm)?;
        state.vm.restore_irqchip(&vm)?;
        let mut new_vcpu = Arc::default();
        let mut vcpus = Vec::with_capacity(state.vcpus.len());
        for (number, vcpu) in state.vcpus.into_iter().enumerate() {
            let fd = create_vcpu(&vm, number)?;
            let native = tsc_khz(&fd)? == vcpu.tsc_khz;
            let tsc = if native { Tsc::Native } else { Tsc::Scaled };
            if number == 0 {
                new_vcpu = Arc::new(NewVcpu::with(&vcpu.cpuid_list()?, &fd, &host.msrs)?);
            }
            let prepared = vcpu.prepare(number, &new_vcpu, tsc)?;
            prepared.restore(&fd)?;
            vcpus.push(prepared);
        }
        state.vm.restore_clock(&vm)?;
        Ok(Frozen {
            description: state.description,
            vm: state.vm,
            vcpus,
            new_vcpu,
        })
    }

    /// The machine without its shared part, and that part: for [`Frozen::with`].
    pub(crate) fn apart(mut self) -> (Frozen, Result<NewVcpu, Arc<NewVcpu>>) {
        let new_vcpu = Arc::try_unwrap(std::mem::take(&mut self.new_vcpu));
        (self, new_vcpu)
    }

    /// The machine with a shared part put back.
    pub(crate) fn with(mut self, new_vcpu: Arc<NewVcpu>) -> Frozen {
        // The empty part that stood in is not freed: its place would be taken by forks.
        std::mem::forget(std::mem::replace(&mut self.new_vcpu, new_vcpu));
        self
    }

    /// The machine as it goes into a file.
    pub fn state(&self) -> MachineState {
        MachineState {
            description: self.description.clone(),
            vm: self.vm.clone(),
            vcpus: self.vcpus.iter().map(|vcpu| vcpu.state.clone()).collect(),
        }
    }

    /// Segments and registers of the first vCPU, for the benchmark's floor.
    pub(crate) fn first_registers(&self) -> (&kvm_bindings::kvm_sregs, &kvm_bindings::kvm_regs) {
        let first = &self.vcpus[0].state;
        (&first.sregs, &first.regs)
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }
}

/// A VM with its devices. Fields drop in this order: vCPUs and VM before the memory they use.
#[derive(Debug)]
pub struct Machine {
    vcpus: Vec<Arc<Vcpu>>,
    vm: Arc<VmFd>,
    devices: Devices,
    exit: ExitEvent,
    memory: Arc<Memory>,
    host: Arc<Host>,
    new_vcpu: Arc<NewVcpu>,
}

/// Measures stages: each call returns the nanoseconds since the one before.
#[derive(Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts at `start`.
    pub fn from(start: Instant) -> Stopwatch {
        Stopwatch(start)
    }

    /// Nanoseconds since the last call.
    pub fn lap(&mut self) -> u32 {
        let now = Instant::now();
        let lap = now.duration_since(self.0);
        self.0 = now;
        u32::try_from(lap.as_nanos()).unwrap_or(u32::MAX)
    }
}

impl Machine {
    /// Builds a VM in the order that is fast and puts a frozen machine into it.
    pub fn restore(
        host: &Arc<Host>,
        memory: &Arc<Memory>,
        frozen: &Frozen,
        resources: Resources,
        watch: &mut Stopwatch,
        stages: &mut Stages,
    ) -> Result<Machine, Error> {
        let (vm, vcpus) = build(host, memory, frozen.vcpus.len(), watch, stages)?;
        frozen.vm.restore_irqchip(&vm)?;
        if host.confuses_young_counters
            && let (Some(first), Some(prepared)) = (vcpus.first(), frozen.vcpus.first())
        {
            first.with_fd(|fd| prepared.break_clock_tie(fd))?;
        }
        for (vcpu, prepared) in vcpus.iter().zip(&frozen.vcpus) {
            vcpu.with_fd(|fd| prepared.restore(fd))?;
        }
        let exit = ExitEvent::new().map_err(Error::Prepare)?;
        let devices = Devices::restore(&frozen.description.devices, resources, &vm, memory, &exit)?;
        frozen.vm.restore_clock(&vm)?;
        stages.state_ns = watch.lap();
        Ok(Machine {
            vcpus,
            vm,
            devices,
            exit,
            memory: memory.clone(),
            host: host.clone(),
            new_vcpu: frozen.new_vcpu.clone(),
        })
    }

    /// Builds a VM that has never run. `set_up` prepares each vCPU; it sees the vCPU's number.
    pub fn fresh(
        host: &Arc<Host>,
        memory: &Arc<Memory>,
        vcpu_count: usize,
        devices: impl FnOnce(&Arc<VmFd>, &ExitEvent) -> Result<Devices, devices::Error>,
        set_up: impl Fn(usize, &kvm_ioctls::VcpuFd) -> Result<(), kvm::Error>,
    ) -> Result<Machine, Error> {
        let mut watch = Stopwatch::from(Instant::now());
        let (vm, vcpus) = build(host, memory, vcpu_count, &mut watch, &mut Stages::default())?;
        let mut new_vcpu = NewVcpu::default();
        for (number, vcpu) in vcpus.iter().enumerate() {
            vcpu.with_fd(|fd| set_up(number, fd))?;
            if number == 0 {
                new_vcpu = vcpu.with_fd(|fd| new_vcpu_beside(host, fd))?;
            }
        }
        vcpus
            .iter()
            .try_for_each(|vcpu| vcpu.with_fd(enter_in_map))?;
        let exit = ExitEvent::new().map_err(Error::Prepare)?;
        let devices = devices(&vm, &exit)?;
        let (memory, host) = (memory.clone(), host.clone());
        Ok(Machine {
            vcpus,
            vm,
            devices,
            exit,
            memory,
            host,
            new_vcpu: Arc::new(new_vcpu),
        })
    }

    /// Starts the vCPU threads; with `paused` they wait at the gate.
    pub fn start(&self, paused: bool, confine: fn()) -> Result<Threads, Error> {
        let gate = if paused {
            Gate::new_closed()
        } else {
            Gate::default()
        };
        let shared = Shared {
            pio: self.devices.pio(),
            mmio: self.devices.mmio(),
            gate: Arc::new(gate),
            exit: self.exit.clone(),
        };
        Ok(Threads::start(
            self.vcpus.clone(),
            &shared,
            self.devices.wakeups(),
            confine,
        )?)
    }

    /// Reads the machine out. The vCPUs are parked.
    pub fn save(&self) -> Result<Frozen, Error> {
        let vm = VmState::capture(&self.vm)?;
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for (number, vcpu) in self.vcpus.iter().enumerate() {
            let state = vcpu.with_fd(|fd| VcpuState::capture(fd, &self.host.msrs))?;
            vcpus.push(state.prepare(number, &self.new_vcpu, Tsc::Native)?);
        }
        let description = MachineDescription {
            memory_mib: self.memory.mib(),
            devices: self.devices.save()?,
            host: self.host.facts.clone(),
        };
        Ok(Frozen {
            description,
            vm,
            vcpus,
            new_vcpu: self.new_vcpu.clone(),
        })
    }

    /// The devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// The devices, to put a new controller's channel into.
    pub fn devices_mut(&mut self) -> &mut Devices {
        &mut self.devices
    }

    /// How the machine ends.
    pub fn exit(&self) -> &ExitEvent {
        &self.exit
    }

    /// Guest RAM.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// What the process knows of KVM.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }
}

/// Memory slots first, then the chip, then the vCPUs: see [`kvm`].
fn build(
    host: &Host,
    memory: &Memory,
    vcpus: usize,
    watch: &mut Stopwatch,
    stages: &mut Stages,
) -> Result<(Arc<VmFd>, Vec<Arc<Vcpu>>), kvm::Error> {
    let vm = kvm::create_vm(&host.kvm)?;
    stages.vm_ns = watch.lap();
    kvm::add_memory(&vm, memory)?;
    stages.memory_ns = watch.lap();
    kvm::add_irqchip(&vm)?;
    stages.irqchip_ns = watch.lap();
    let create = |number| Ok(Arc::new(Vcpu::new(create_vcpu(&vm, number)?)));
    let vcpus: Result<Vec<_>, kvm::Error> = (0..vcpus).map(create).collect();
    stages.vcpu_ns = watch.lap();
    Ok((Arc::new(vm), vcpus?))
}

/// Writes a local APIC back as it is. The kernel finds the CPU that an interrupt is for in a map, and
/// the map may lack a CPU that was created after it was made, until a local APIC is written.
fn enter_in_map(fd: &kvm_ioctls::VcpuFd) -> Result<(), kvm::Error> {
    let lapic = fd.get_lapic().map_err(failed("read the local APIC"))?;
    fd.set_lapic(&lapic).map_err(failed("set the local APIC"))
}

fn create_vcpu(vm: &VmFd, number: usize) -> Result<kvm_ioctls::VcpuFd, kvm::Error> {
    vm.create_vcpu(number as u64)
        .map_err(failed("create a vCPU"))
}

/// What a new vCPU of a machine that is booted here holds: one of a VM with the same CPUID beside it,
/// because the machine's own have been set up already.
fn new_vcpu_beside(host: &Host, fd: &kvm_ioctls::VcpuFd) -> Result<NewVcpu, kvm::Error> {
    let cpuid = fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    let cpuid = cpuid.map_err(failed("read the CPUID"))?;
    let vm = kvm::create_vm(&host.kvm)?;
    kvm::add_irqchip(&vm)?;
    NewVcpu::with(&cpuid, &create_vcpu(&vm, 0)?, &host.msrs)
}
