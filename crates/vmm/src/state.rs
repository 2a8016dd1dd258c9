//! The frozen machine without its memory: what `state.bin` holds, and how it is read out and put back.
//!
//! Kernel structures are kept as the kernel's own bytes (their layout is ABI); devices as JSON, which
//! is parsed once when a template loads. [`file`] is the container with version and checksum,
//! [`compat`] decides whether this host can go on with a machine frozen elsewhere.

pub mod compat;
mod fields;
pub mod file;
pub mod msrs;
mod new;
mod vcpu;
mod vm;

pub use new::NewVcpu;
pub use vcpu::{Prepared, Tsc};

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// One vCPU, standing still.
#[derive(Debug, Clone)]
pub struct VcpuState {
    /// What the guest sees of the CPU.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers, the clocks among them.
    pub msrs: Vec<kvm_msr_entry>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, interrupt bitmap.
    pub sregs: kvm_sregs,
    /// Floating point and vectors.
    pub xsave: Arc<kvm_xsave>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
    /// Running, halted, waiting for start-up.
    pub mp_state: kvm_mp_state,
    /// Frequency of the guest's time-stamp counter.
    pub tsc_khz: u32,
}

/// The interrupt chip and the clock.
#[derive(Debug, Clone)]
pub struct VmState {
    /// The kvmclock, nanoseconds of guest time.
    pub clock: kvm_clock_data,
    /// Both PICs and the IOAPIC.
    pub irqchips: [kvm_irqchip; 3],
}

/// Facts about the host on which the machine was frozen, for the error messages of [`compat`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostFacts {
    /// CPU vendor string of leaf 0.
    pub vendor: String,
    /// Kernel release.
    pub kernel: String,
}

/// The machine's shape and its devices.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MachineDescription {
    /// Guest RAM.
    pub memory_mib: u32,
    /// Devices by name, in the order they were put on the bus; each knows its own format.
    pub devices: BTreeMap<String, serde_json::Value>,
    /// Where it was frozen.
    pub host: HostFacts,
}

/// Everything but memory.
#[derive(Debug, Clone)]
pub struct MachineState {
    /// Shape and devices.
    pub description: MachineDescription,
    /// Interrupt chip and clock.
    pub vm: VmState,
    /// One for each vCPU.
    pub vcpus: Vec<VcpuState>,
}

#[cfg(test)]
pub(crate) mod tests;
