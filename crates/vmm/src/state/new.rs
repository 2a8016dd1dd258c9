//! What a new vCPU holds by itself, so that a fork need not write it: each call that is left out is one
//! entry into the kernel's vCPU less, which a paravirtual KVM makes expensive.

use kvm_bindings::{CpuId, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::vcpu::set_cpuid;
use super::{VcpuState, msrs};
use crate::kvm::Error;

/// The first vCPU of a VM when it has been given its CPUID and nothing else. By default nothing is known of
/// it, and all of a state is written.
///
/// In a box: forks count who refers to this, and what they count with must not lie far apart.
#[derive(Debug, Clone, Default)]
pub struct NewVcpu(Option<Box<VcpuState>>);

/// What has to be written of a state, besides its MSRs, because a new vCPU does not hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Missing {
    pub mp_state: bool,
    pub xsave: bool,
    pub xcrs: bool,
    pub debugregs: bool,
    pub events: bool,
}

impl Missing {
    const EVERYTHING: Missing = Missing {
        mp_state: true,
        xsave: true,
        xcrs: true,
        debugregs: true,
        events: true,
    };
}

impl NewVcpu {
    /// Gives the `first` vCPU of a VM, which has nothing yet, its CPUID and reads it. `indices` are the MSRs that
    /// are kept, ascending.
    pub fn with(cpuid: &CpuId, first: &VcpuFd, indices: &[u32]) -> Result<NewVcpu, Error> {
        set_cpuid(first, cpuid)?;
        let state = VcpuState::capture(first, indices)?;
        Ok(NewVcpu(Some(Box::new(state))))
    }

    /// What has to be written for vCPU `number` to hold `state`.
    ///
    /// Registers, segments and the local APIC always: no machine that ran has those of a new one.
    pub(super) fn missing(&self, state: &VcpuState, number: usize) -> Missing {
        let Some(new) = self.0.as_deref() else {
            return Missing::EVERYTHING;
        };
        Missing {
            // Only the first vCPU is made running; the others wait to be started.
            mp_state: number > 0 || state.mp_state != new.mp_state,
            xsave: state.xsave.region != new.xsave.region,
            xcrs: state.xcrs != new.xcrs,
            debugregs: state.debugregs != new.debugregs,
            events: state.events != new.events,
        }
    }

    /// The MSRs that have to be written, in the order of the state: a few instead of a hundred.
    pub(super) fn missing_msrs(&self, state: &VcpuState) -> Vec<kvm_msr_entry> {
        let held = self.0.as_deref().map_or(&[][..], |new| &new.msrs);
        let missing = |msr: &&kvm_msr_entry| {
            let at = held.binary_search_by_key(&msr.index, |held| held.index);
            msrs::moves(msr.index) || at.map_or(true, |at| held[at].data != msr.data)
        };
        state.msrs.iter().filter(missing).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvm_bindings::{kvm_mp_state, kvm_xsave};

    use super::*;
    use crate::state::tests::sample;

    const OTHER_MSR: u32 = 0x277;

    /// A vCPU, and what is known of a new one that holds the same.
    fn new() -> (VcpuState, NewVcpu) {
        let mut state = sample().vcpus.swap_remove(0);
        state.msrs.push(kvm_msr_entry {
            index: OTHER_MSR,
            data: 6,
            ..Default::default()
        });
        (state.clone(), NewVcpu(Some(Box::new(state))))
    }

    fn indices(msrs: &[kvm_msr_entry]) -> Vec<u32> {
        msrs.iter().map(|msr| msr.index).collect()
    }

    #[test]
    fn what_a_new_one_holds_is_not_written() {
        let (state, new) = new();
        // Its own counter has moved on since it was read.
        assert_eq!(indices(&new.missing_msrs(&state)), [msrs::TSC]);
        let nothing = Missing {
            mp_state: false,
            xsave: false,
            xcrs: false,
            debugregs: false,
            events: false,
        };
        assert_eq!(new.missing(&state, 0), nothing);
    }

    #[test]
    fn everything_is_written_where_nothing_is_known() {
        let (state, _) = new();
        let unknown = NewVcpu::default();
        assert_eq!(unknown.missing(&state, 0), Missing::EVERYTHING);
        assert_eq!(unknown.missing_msrs(&state), state.msrs);
    }

    #[test]
    fn only_the_first_is_running_by_itself() {
        let (state, new) = new();
        assert!(new.missing(&state, 1).mp_state);
    }

    #[test]
    fn each_difference_is_written() {
        let (state, new) = new();
        let changed = |change: fn(&mut VcpuState)| {
            let mut changed = state.clone();
            change(&mut changed);
            changed
        };
        let missing = |change| new.missing(&changed(change), 0);
        let missing_msrs = |change| indices(&new.missing_msrs(&changed(change)));
        assert!(missing(|s| s.mp_state = kvm_mp_state { mp_state: 0 }).mp_state);
        assert!(missing(|s| s.xcrs.xcrs[0].value = 7).xcrs);
        assert!(missing(|s| s.debugregs.dr7 = 0x401).debugregs);
        assert!(missing(|s| s.events.nmi.pending = 1).events);
        let vectors = |s: &mut VcpuState| {
            let mut xsave = kvm_xsave::default();
            xsave.region.copy_from_slice(&s.xsave.region);
            xsave.region[1023] += 1;
            s.xsave = Arc::new(xsave);
        };
        assert!(missing(vectors).xsave);
        let differing = missing_msrs(|s| s.msrs[1].data = 7);
        assert_eq!(differing, [msrs::TSC, OTHER_MSR]);
        let unknown = missing_msrs(|s| s.msrs[1].index = OTHER_MSR + 1);
        assert_eq!(unknown, [msrs::TSC, OTHER_MSR + 1]);
    }
}
