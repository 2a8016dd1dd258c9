//! What this process knows about KVM on this host. Learned once; forks inherit it.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
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
    /// Whether the kernel takes a young time-stamp counter that it is given for another's.
    pub confuses_young_counters: bool,
}

impl Host {
    /// Opens /dev/kvm and asks what it offers.
    pub fn open() -> Result<Host, Error> {
        let kvm = kvm::open()?;
        let supported = compat::supported(&kvm)?;
        let shown = shown(&kvm, &supported)?;
        let facts = compat::host_facts(&supported);
        let msrs = msrs::indices(&kvm)?;
        let confuses_young_counters = confuses_young_counters(&facts.kernel);
        Ok(Host {
            kvm,
            supported,
            shown,
            facts,
            msrs,
            confuses_young_counters,
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

/// The frequency of the host's time-stamp counter as a vCPU sees it.
pub fn tsc_khz(fd: &kvm_ioctls::VcpuFd) -> Result<u32, Error> {
    fd.get_tsc_khz().map_err(failed("read the TSC frequency"))
}

/// Kernels before 6.7 ("Don't sync user-written TSC against startup values") take a
/// counter within a second of what a new VM's would show for an attempt to synchronise with it. So may one
/// whose release says nothing.
fn confuses_young_counters(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok());
    match (next(), next()) {
        (Some(major), Some(minor)) => (major, minor) < (6, 7),
        _ => true,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_kernels_confuse_young_counters() {
        for old in [
            "5.10.0-28-amd64",
            "6.1.0-13-amd64",
            "6.6.58",
            "",
            "linux",
            "7",
        ] {
            assert!(confuses_young_counters(old), "{old:?}");
        }
        for new in ["6.7.0", "6.18.44-x", "6.12-rc1", "7.0.0", "10.1.2"] {
            assert!(!confuses_young_counters(new), "{new:?}");
        }
    }
}
