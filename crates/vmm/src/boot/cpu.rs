//! What a CPU is told about itself, and its registers at the first instruction.
//!
//! All of it is computed here and applied by the vCPU code. Every CPU is a core of its own in one
//! package, its APIC id is its number.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{Entry, layout};

/// Most vCPUs a machine may have.
pub const MAX_CPUS: u8 = 32;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_INTEL_CACHE: u32 = 0x4;
const LEAF_PMU: u32 = 0xa;
const LEAF_TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_SEVERAL_CPUS: u32 = 1 << 28;
/// Page faults reported to the guest while the host fetches the page. A fork or a snapshot would
/// lose the "page is here now" messages of faults under way and leave processes waiting for ever.
const KVM_ASYNC_PAGE_FAULT: u32 = (1 << 4) | (1 << 10) | (1 << 14);

/// The CPUID tables of vCPU `cpu` of `cpus`, from what KVM supports on this host.
pub fn cpuid(supported: &CpuId, cpu: u8, cpus: u8) -> CpuId {
    let mut tables = supported.clone();
    for entry in tables.as_mut_slice() {
        adjust(entry, u32::from(cpu), u32::from(cpus));
    }
    tables
}

fn adjust(entry: &mut kvm_cpuid_entry2, cpu: u32, cpus: u32) {
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = (entry.ebx & 0xffff) | (cpus << 16) | (cpu << 24);
            // The local APIC is KVM's, which always has the deadline timer.
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            entry.edx &= !EDX_SEVERAL_CPUS;
            if cpus > 1 {
                entry.edx |= EDX_SEVERAL_CPUS;
            }
        }
        LEAF_INTEL_CACHE if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level < 3 { 0 } else { cpus - 1 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((cpus - 1) << 26);
        }
        // Counters are not saved with a machine and differ between hosts.
        LEAF_PMU => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        leaf if LEAF_TOPOLOGY.contains(&leaf) => topology(entry, cpu, cpus),
        LEAF_KVM_FEATURES => entry.eax &= !KVM_ASYNC_PAGE_FAULT,
        LEAF_AMD_SIZES => {
            entry.ecx = (entry.ecx & !0xf0ff) | (cpus - 1) | (id_bits(cpus) << 12);
        }
        LEAF_AMD_CACHE if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level < 3 { 0 } else { cpus - 1 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        LEAF_AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (cpu, cpu, 0),
        _ => {}
    }
}

/// Level 0 is the thread, of which each core has one; level 1 is the core.
fn topology(entry: &mut kvm_cpuid_entry2, cpu: u32, cpus: u32) {
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, 1 << 8),
        1 => (id_bits(cpus), cpus, 1 | (2 << 8)),
        level => (0, 0, level & 0xff),
    };
    entry.edx = cpu;
}

/// Bits of an APIC id that tell cores apart.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// Model-specific registers every CPU starts with; the rest starts as KVM leaves it.
pub fn msrs() -> Vec<kvm_msr_entry> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    vec![
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
}

/// General registers of the first CPU. The others wait for the guest to start them.
pub fn registers(entry: Entry) -> kvm_regs {
    kvm_regs {
        // Bit 1 is always set.
        rflags: 2,
        rip: entry.instruction,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: entry.zero_page,
        ..Default::default()
    }
}

/// Floating point state of the first CPU: all exceptions masked, extended precision.
pub fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Null, unused, 64-bit code, data, task: the selectors above, as the boot protocol asks.
const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

/// Special registers of the first CPU: 64-bit mode, flat segments, the first GiB mapped to itself.
/// Writes the tables they point to into guest memory.
pub fn special_registers(
    memory: &GuestMemoryMmap,
    mut sregs: kvm_sregs,
) -> Result<kvm_sregs, GuestMemoryError> {
    write_gdt(memory)?;
    write_page_tables(memory)?;
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        g: 1,
        present: 1,
        s: 1,
        ..Default::default()
    };
    let code = kvm_segment {
        selector: CODE_SELECTOR,
        type_: 0xb,
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 0x3,
        db: 1,
        ..flat
    };
    let task = kvm_segment {
        selector: TASK_SELECTOR,
        type_: 0xb,
        s: 0,
        ..flat
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    let limit = u16::try_from(size_of_val(&GDT) - 1).expect("five entries");
    sregs.gdt = kvm_dtable {
        base: layout::GDT,
        limit,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    Ok(sregs)
}

fn write_gdt(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    for (index, entry) in GDT.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(layout::GDT + index as u64 * 8))?;
    }
    Ok(())
}

/// One table of each level and 512 large pages.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let [top, second, third] = [0, 0x1000, 0x2000].map(|offset| layout::PAGE_TABLES + offset);
    memory.write_obj(second | PRESENT_WRITABLE, GuestAddress(top))?;
    memory.write_obj(third | PRESENT_WRITABLE, GuestAddress(second))?;
    for index in 0..512u64 {
        let page = (index << 21) | LARGE | PRESENT_WRITABLE;
        memory.write_obj(page, GuestAddress(third + index * 8))?;
    }
    Ok(())
}
