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
    /// The CPU features that KVM offers for guests.
    supported: Vec<kvm_cpuid_entry2>,
    /// What a guest then sees. A paravirtual KVM cannot hide the host's own features from it, so this
    /// may be more than was offered.
    pub shown: Vec<kvm_cpuid_entry2>,
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
        let shown = shown(&kvm, &supported)?;
        let facts = compat::host_facts(&supported);
        let msrs = msrs::indices(&kvm)?;
        Ok(Host {
            kvm,
            supported,
            shown,
            facts,
            msrs,
        })
    }

    /// The offered features as the kernel lists them.
    pub fn cpuid(&self) -> CpuId {
        list(&self.supported)
    }
}

fn list(entries: &[kvm_cpuid_entry2]) -> CpuId {
    CpuId::from_entries(entries).expect("the kernel's own list is not too long")
}

fn shown(kvm: &Kvm, supported: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    let vm = kvm::create_vm(kvm)?;
    let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    vcpu.set_cpuid2(&list(supported))
        .map_err(failed("set the CPUID"))?;
    let shown = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    Ok(shown.map_err(failed("read the CPUID"))?.as_slice().to_vec())
}

/// What MSRs hold in a vCPU that has been given its CPUID and nothing else.
#[derive(Debug, Clone, Default)]
pub struct MsrDefaults(HashMap<u32, u64>);

impl MsrDefaults {
    /// Reads them from a fresh vCPU.
    pub fn read(fresh: &kvm_ioctls::VcpuFd, indices: &[u32]) -> Result<MsrDefaults, Error> {
        let entries = crate::state::read_msrs(fresh, indices)?;
        Ok(MsrDefaults(
            entries.iter().map(|msr| (msr.index, msr.data)).collect(),
        ))
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

/// Whether the CPU shows vmx or svm. Without them /dev/kvm is a paravirtual one, in which stock
/// kernels are interpreted.
pub fn hardware_virtualization() -> bool {
    let Ok(info) = std::fs::read_to_string("/proc/cpuinfo") else {
        return false;
    };
    let flags = info
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    flags
        .split_whitespace()
        .any(|flag| matches!(flag, "vmx" | "svm"))
}
