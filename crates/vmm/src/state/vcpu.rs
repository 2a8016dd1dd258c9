//! Reading out and putting back one vCPU. The order of the calls matters and is explained.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::new::Missing;
use super::{NewVcpu, VcpuState, msrs};
use crate::kvm::{Error, failed};
use crate::vcpu::set_xsave;

/// MSRs per call; the kernel takes 256.
const MSRS_PER_CALL: usize = 200;

impl VcpuState {
    /// Reads a vCPU that stands still. `indices` are the MSRs to keep.
    ///
    /// The MP state comes first because reading it makes the kernel deliver INITs and SIPIs that are
    /// still latched; the pending events come last because reading MSRs may change them.
    pub fn capture(fd: &VcpuFd, indices: &[u32]) -> Result<VcpuState, Error> {
        let mp_state = fd.get_mp_state().map_err(failed("read the MP state"))?;
        let regs = fd.get_regs().map_err(failed("read the registers"))?;
        let sregs = fd
            .get_sregs()
            .map_err(failed("read the segment registers"))?;
        let xsave = Arc::new(fd.get_xsave().map_err(failed("read the vector state"))?);
        let xcrs = fd
            .get_xcrs()
            .map_err(failed("read the extended control registers"))?;
        let debugregs = fd
            .get_debug_regs()
            .map_err(failed("read the debug registers"))?;
        let lapic = fd.get_lapic().map_err(failed("read the local APIC"))?;
        let tsc_khz = fd.get_tsc_khz().map_err(failed("read the TSC frequency"))?;
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("read the CPUID"))?;
        let msrs = read_msrs(fd, indices)?;
        let events = fd
            .get_vcpu_events()
            .map_err(failed("read pending events"))?;
        Ok(VcpuState {
            cpuid: cpuid.as_slice().to_vec(),
            msrs,
            regs,
            sregs,
            xsave,
            xcrs,
            lapic,
            debugregs,
            events,
            mp_state,
            tsc_khz,
        })
    }

    /// Makes a state ready to be put into many vCPUs `number`: lists in the kernel's form, only what a
    /// `new` vCPU does not hold anyway.
    pub fn prepare(self, number: usize, new: &NewVcpu, tsc: Tsc) -> Result<Prepared, Error> {
        let cpuid = self.cpuid_list()?;
        let missing = new.missing(&self, number);
        let msrs = new.missing_msrs(&self);
        let msrs: Result<_, _> = msrs.chunks(MSRS_PER_CALL).map(msr_list).collect();
        Ok(Prepared {
            cpuid,
            msrs: msrs?,
            missing,
            tsc,
            state: self,
        })
    }

    /// The CPUID in the kernel's form.
    pub fn cpuid_list(&self) -> Result<CpuId, Error> {
        CpuId::from_entries(&self.cpuid).map_err(|_| too_long("set the CPUID"))
    }
}

/// How the guest's time-stamp counter gets its frequency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tsc {
    /// The host's is the same.
    Native,
    /// It must be scaled.
    Scaled,
}

/// A state ready to be put into vCPUs.
#[derive(Debug)]
pub struct Prepared {
    /// The state itself, with all its MSRs.
    pub state: VcpuState,
    cpuid: CpuId,
    msrs: Vec<Msrs>,
    missing: Missing,
    tsc: Tsc,
}

impl Prepared {
    /// Puts the state into a new vCPU.
    ///
    /// CPUID first: it decides which of the others are legal. The local APIC before the MSRs: the TSC
    /// deadline is only accepted once the APIC's timer is in that mode. Events last: the other calls
    /// may drop what is pending.
    pub fn restore(&self, fd: &VcpuFd) -> Result<(), Error> {
        let state = &self.state;
        set_cpuid(fd, &self.cpuid)?;
        if self.tsc == Tsc::Scaled {
            fd.set_tsc_khz(state.tsc_khz)
                .map_err(failed("scale the TSC to the machine's"))?;
        }
        if self.missing.mp_state {
            fd.set_mp_state(state.mp_state)
                .map_err(failed("restore the MP state"))?;
        }
        fd.set_sregs(&state.sregs)
            .map_err(failed("restore the segment registers"))?;
        fd.set_regs(&state.regs)
            .map_err(failed("restore the registers"))?;
        self.restore_vectors(fd)?;
        if self.missing.debugregs {
            fd.set_debug_regs(&state.debugregs)
                .map_err(failed("restore the debug registers"))?;
        }
        fd.set_lapic(&state.lapic)
            .map_err(failed("restore the local APIC"))?;
        self.msrs.iter().try_for_each(|list| write_msrs(fd, list))?;
        if self.missing.events {
            fd.set_vcpu_events(&state.events)
                .map_err(failed("restore pending events"))?;
        }
        Ok(())
    }

    fn restore_vectors(&self, fd: &VcpuFd) -> Result<(), Error> {
        if self.missing.xsave {
            set_xsave(fd, &self.state.xsave)?;
        }
        if self.missing.xcrs {
            fd.set_xcrs(&self.state.xcrs)
                .map_err(failed("restore the extended control registers"))?;
        }
        Ok(())
    }

    /// For the first vCPU of a VM, before [`Prepared::restore`], where the kernel confuses young time-stamp
    /// counters: sees to it that this one is taken as it is.
    ///
    /// Such kernels take a counter within a second of what a new VM's would show for an attempt to
    /// synchronise with it, and ignore the value: time would go back in a guest that was frozen in its
    /// first second. Only a value far from both breaks the tie. Later vCPUs want to be synchronised.
    pub fn break_clock_tie(&self, fd: &VcpuFd) -> Result<(), Error> {
        let counter = self.state.msrs.iter().find(|msr| msr.index == msrs::TSC);
        let cycles = counter.map_or(0, |msr| msr.data);
        if cycles / 1000 > 2 * u64::from(self.state.tsc_khz) {
            return Ok(());
        }
        let far = kvm_msr_entry {
            index: msrs::TSC,
            data: 1 << 50,
            ..Default::default()
        };
        write_msrs(fd, &msr_list(&[far])?)
    }
}

pub(super) fn set_cpuid(fd: &VcpuFd, cpuid: &CpuId) -> Result<(), Error> {
    fd.set_cpuid2(cpuid).map_err(failed("set the CPUID"))
}

/// Reads MSRs, leaving out those that this vCPU does not have.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        let entries: Vec<_> = chunk.iter().map(entry).collect();
        let mut msrs = msr_list(&entries)?;
        let read = fd.get_msrs(&mut msrs).map_err(failed("read the MSRs"))?;
        found.extend_from_slice(&msrs.as_slice()[..read]);
        // The kernel stops at the first one it does not know: step over it.
        let skip = usize::from(read < chunk.len());
        rest = &rest[read + skip..];
    }
    Ok(found)
}

fn write_msrs(fd: &VcpuFd, list: &Msrs) -> Result<(), Error> {
    let written = fd.set_msrs(list).map_err(failed("restore the MSRs"))?;
    match list.as_slice().get(written) {
        Some(refused) => Err(Error::Msr {
            index: refused.index,
            value: refused.data,
        }),
        None => Ok(()),
    }
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| too_long("list the MSRs"))
}

fn too_long(step: &'static str) -> Error {
    Error::Call {
        step,
        source: std::io::Error::from_raw_os_error(libc::E2BIG),
    }
}
