//! /dev/kvm, and one VM made from it in the order that is fast.
//!
//! Memory slots come first and are never changed again: a slot added after the interrupt chip waits
//! for a grace period of the kernel's I/O bus (4 to 8 ms on a 250 Hz kernel). The chip follows, then
//! the vCPUs. There is no PIT: a guest calibrates from the kvmclock and uses the TSC deadline timer.

#![allow(
    unsafe_code,
    reason = "memory slots hand raw addresses to the kernel; the block is argued"
)]

use std::fmt;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::boot::layout;
use crate::bus::IrqLine;
use crate::memory::Memory;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No device.
    #[error(
        "/dev/kvm does not exist: load kvm_intel or kvm_amd, enable virtualisation in the firmware, or use --engine qemu"
    )]
    Absent,
    /// No permission.
    #[error(
        "no permission to open /dev/kvm: run as root or join the group that owns it (usually kvm)"
    )]
    Denied(#[source] io::Error),
    /// Anything else at opening it.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// The kernel's KVM is too old or too limited.
    #[error("this kernel's KVM lacks {0:?}, which forkd needs: use Linux 5.10 or later")]
    Lacks(Cap),
    /// An MSR of the frozen machine is not accepted here.
    #[error(
        "this host's CPU or kernel refuses MSR {index:#x} = {value:#x} of the frozen machine: restore it on a host like the one it was taken on"
    )]
    Msr {
        /// The register.
        index: u32,
        /// What it held.
        value: u64,
    },
    /// One of the calls failed.
    #[error("KVM refused to {step}")]
    Call {
        /// What was asked.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The kernel's errno, 0 where there is none.
    pub fn errno(&self) -> u32 {
        let source = match self {
            Error::Absent => return libc::ENOENT as u32,
            Error::Lacks(_) | Error::Msr { .. } => return 0,
            Error::Denied(source) | Error::Open(source) | Error::Call { source, .. } => source,
        };
        source.raw_os_error().unwrap_or(0).unsigned_abs()
    }
}

/// Turns a KVM errno into the step that failed.
pub fn failed(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Call {
        step,
        source: io::Error::from_raw_os_error(e.errno()),
    }
}

/// What a fork or branch needs of the kernel.
const NEEDED: [Cap; 9] = [
    Cap::Irqchip,
    Cap::UserMemory,
    Cap::ExtCpuid,
    Cap::AdjustClock,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Debugregs,
    Cap::Xsave,
    Cap::ImmediateExit,
];

/// Opens /dev/kvm and checks what it can.
pub fn open() -> Result<Kvm, Error> {
    let fd = Kvm::open_with_cloexec(true).map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::Absent,
        libc::EACCES | libc::EPERM => Error::Denied(io::Error::from_raw_os_error(e.errno())),
        errno => Error::Open(io::Error::from_raw_os_error(errno)),
    })?;
    // SAFETY: the descriptor was opened by the line above and is owned by nobody else.
    let kvm = unsafe { Kvm::from_raw_fd(fd) };
    match NEEDED.into_iter().find(|cap| !kvm.check_extension(*cap)) {
        Some(cap) => Err(Error::Lacks(cap)),
        None => Ok(kvm),
    }
}

/// Creates a VM without memory.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = loop {
        match kvm.create_vm() {
            // A signal may interrupt the kernel's set-up; nothing has happened then.
            Err(e) if e.errno() == libc::EINTR => continue,
            vm => break vm.map_err(failed("create a VM"))?,
        }
    };
    // Older Intel CPUs need pages for real mode, which the kernel puts where it is told; others ignore it.
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(failed("place the identity map"))?;
    vm.set_tss_address(layout::TSS as usize)
        .map_err(failed("place the task state segment"))?;
    Ok(vm)
}

/// Gives the VM its memory. Once, before anything else.
pub fn add_memory(vm: &VmFd, memory: &Memory) -> Result<(), Error> {
    for (slot, (address, offset, len)) in memory.regions().into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: address,
            memory_size: len,
            userspace_addr: memory.address() + offset,
        };
        // SAFETY: the range lies in `memory`'s mapping, which outlives the VM: a `Machine` holds
        // both and the VM is closed first. The guest may write there at any time; the rest of the
        // program reaches guest memory only through volatile accessors, or while it stands still.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("map guest memory"))?;
    }
    Ok(())
}

/// Creates the interrupt chip: local APICs, IOAPIC and PICs in the kernel.
pub fn add_irqchip(vm: &VmFd) -> Result<(), Error> {
    vm.create_irq_chip()
        .map_err(failed("create the interrupt chip"))
}

/// An interrupt input of the in-kernel chip.
pub struct KvmIrq {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl KvmIrq {
    /// The input with this number.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> KvmIrq {
        KvmIrq { vm, gsi }
    }
}

impl fmt::Debug for KvmIrq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmIrq")
            .field("gsi", &self.gsi)
            .finish_non_exhaustive()
    }
}

impl IrqLine for KvmIrq {
    fn raise(&self) {
        _ = self.vm.set_irq_line(self.gsi, true);
        _ = self.vm.set_irq_line(self.gsi, false);
    }
}
