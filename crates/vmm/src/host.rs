//! What this process knows about KVM on this host. Learned once; forks inherit it.

use std::collections::HashMap;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;

use crate::kvm::{self, Error, failed};
use crate::state::{HostFacts, compat, msrs};

/// The open /dev/kvm and what it offers.
#[derive(Debug)]
pub struct Host {
    /// /dev/kvm.
    pub kvm: Kvm,
    /// All CPU features that a guest can be shown.
    pub supported: Vec<kvm_cpuid_entry2>,
    /// Name and version, for messages.
    pub facts: HostFacts,
    /// The MSRs that are read out of a vCPU.
    pub msrs: Vec<u32>,
}

impl Host {
    /// Opens /dev/kvm and asks what it offers.
    pub fn open() -> Result<Host, Error> {
        let kvm = kvm::open()?;
        let supported = compat::supported(&kvm)?;
        let facts = compat::host_facts(&supported);
        let msrs = msrs::indices(&kvm)?;
        Ok(Host { kvm, supported, facts, msrs })
    }

    /// The supported features as the kernel lists them.
    pub fn cpuid(&self) -> CpuId {
        CpuId::from_entries(&self.supported).expect("the kernel's own list is not too long")
    }
}

/// What MSRs hold in a vCPU that has been given its CPUID and nothing else.
#[derive(Debug, Clone, Default)]
pub struct MsrDefaults(HashMap<u32, u64>);

impl MsrDefaults {
    /// Reads them from a fresh vCPU.
    pub fn read(fresh: &kvm_ioctls::VcpuFd, indices: &[u32]) -> Result<MsrDefaults, Error> {
        let entries = crate::state::read_msrs(fresh, indices)?;
        Ok(MsrDefaults(entries.iter().map(|msr| (msr.index, msr.data)).collect()))
    }

    /// The MSRs that a fork has to write: a few instead of a hundred. Order is kept.
    pub fn changed(&self, entries: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
        let changed = |msr: &&kvm_msr_entry| {
            msrs::moves(msr.index) || self.0.get(&msr.index).is_none_or(|data| *data != msr.data)
        };
        entries.iter().filter(changed).copied().collect()
    }
}

/// The frequency of the host's time-stamp counter as a vCPU sees it.
pub fn tsc_khz(fd: &kvm_ioctls::VcpuFd) -> Result<u32, Error> {
    fd.get_tsc_khz().map_err(failed("read the TSC frequency"))
}
