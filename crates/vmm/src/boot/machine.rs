//! A machine that boots Linux: memory filled, CPUs set up, devices made.

use std::sync::Arc;

use kvm_bindings::Msrs;
use kvm_ioctls::VcpuFd;

use super::cpu::{self, MAX_CPUS};
use super::{Entry, Source, linux};
use crate::devices::set::Plan;
use crate::host::Host;
use crate::kvm::{self, failed};
use crate::machine::devices::{Devices, Resources};
use crate::machine::{self, Machine};
use crate::memory::Memory;

/// Why a machine cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a number of CPUs a machine can have.
    #[error("a machine cannot have {0} vcpus; choose 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// Too small for any Linux.
    #[error("{0} MiB of memory are too few to boot Linux; choose 64 or more")]
    Memory(u32),
    /// Kernel, initramfs or command line.
    #[error("could not load the kernel")]
    Load(#[from] linux::Error),
    /// The first CPU's tables could not be written.
    #[error("could not write the first cpu's tables")]
    Tables(#[source] vm_memory::GuestMemoryError),
    /// The VM or its devices.
    #[error(transparent)]
    Machine(#[from] machine::Error),
}

/// Least memory of a machine that boots Linux, MiB.
pub const MEMORY_MIN_MIB: u32 = 64;

/// Makes a machine of `cpus` vCPUs that stands before the kernel's first instruction.
pub fn machine(
    host: &Arc<Host>,
    memory: &Arc<Memory>,
    source: Source<'_>,
    cpus: u8,
    plan: Plan,
    resources: Resources,
) -> Result<Machine, Error> {
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(Error::Cpus(cpus));
    }
    if memory.mib() < MEMORY_MIN_MIB {
        return Err(Error::Memory(memory.mib()));
    }
    let entry = linux::load(memory.guest(), source, &plan.machine(cpus))?;
    // Written once here; the special registers that point to it are set below.
    let flat = cpu::special_registers(memory.guest(), Default::default()).map_err(Error::Tables)?;
    let devices = |vm: &_, exit: &_| Devices::linux(plan, resources, vm, memory, exit);
    let set_up = |number: usize, fd: &VcpuFd| set_up(host, fd, number, cpus, entry, flat);
    Ok(Machine::fresh(
        host,
        memory,
        usize::from(cpus),
        devices,
        set_up,
    )?)
}

fn set_up(
    host: &Host,
    fd: &VcpuFd,
    number: usize,
    cpus: u8,
    entry: Entry,
    flat: kvm_bindings::kvm_sregs,
) -> Result<(), kvm::Error> {
    let number = u8::try_from(number).expect("there are at most 32");
    let tables = cpu::cpuid(&host.cpuid(), number, cpus);
    fd.set_cpuid2(&tables)
        .map_err(failed("set the CPU's features"))?;
    let entries = cpu::msrs();
    let msrs = Msrs::from_entries(&entries).expect("a handful");
    let written = fd
        .set_msrs(&msrs)
        .map_err(failed("set the model-specific registers"))?;
    if let Some(refused) = entries.get(written) {
        return Err(kvm::Error::Msr {
            index: refused.index,
            value: refused.data,
        });
    }
    if number > 0 {
        return Ok(());
    }
    let sregs = fd
        .get_sregs()
        .map_err(failed("read the special registers"))?;
    // What KVM chose for the local APIC stays.
    let sregs = kvm_bindings::kvm_sregs {
        apic_base: sregs.apic_base,
        ldt: sregs.ldt,
        cr8: sregs.cr8,
        ..flat
    };
    fd.set_sregs(&sregs)
        .map_err(failed("set the special registers"))?;
    fd.set_fpu(&cpu::fpu())
        .map_err(failed("set the floating point state"))?;
    fd.set_regs(&cpu::registers(entry))
        .map_err(failed("set the registers"))
}
