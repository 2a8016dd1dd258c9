//! Which MSRs are kept, and which of them a fork has to write.

use kvm_ioctls::Kvm;

use crate::kvm::{Error, failed};

/// Time-stamp counter: always written, because its reset value moves.
pub(super) const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
const SPEC_CTRL: u32 = 0x48;

/// MSRs beyond the kernel's list that carry guest state.
const MORE: [u32; 8] = [
    0x277, // page attribute table
    0x2ff, // default memory type
    TSC_DEADLINE,
    SPEC_CTRL,
    0x1a0,       // miscellaneous enables
    0xc000_0103, // processor id for rdtscp
    0xda0,       // supervisor state mask
    0x140,       // miscellaneous feature enables
];

/// MSR ranges that belong to the host or hold no guest state: performance counters (a fork counts
/// anew), machine-check banks beyond their defaults, and Hyper-V's, which no guest of ours is offered.
fn is_state(index: u32) -> bool {
    !matches!(
        index,
        0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x38d..=0x391 | 0x3f1 | 0x345
            | 0x4c1..=0x4c8 | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b
            | 0x4000_0000..=0x4000_01ff | 0xc000_0300..=0xc000_0303
    )
}

/// The MSRs to read out of a vCPU.
pub fn indices(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().map_err(failed("list the MSRs"))?;
    let listed = list.as_slice().iter().copied().chain(MORE);
    let mut indices: Vec<u32> = listed.filter(|index| is_state(*index)).collect();
    indices.sort_unstable();
    indices.dedup();
    Ok(indices)
}

/// Whether an MSR holds something else every time it is read, in a fresh vCPU too.
pub fn moves(index: u32) -> bool {
    index == TSC
}
