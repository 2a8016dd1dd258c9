//! Loading a Linux kernel and describing the machine to it: loader, e820, ACPI, CPU tables.
//!
//! Only [`machine`] talks to KVM. [`load`] fills guest memory and says where the first CPU starts;
//! [`cpu`] computes registers and tables that the vCPU code then applies.
//!
//! ```text
//! layout  where things are in the guest's address space
//! linux   kernel, initramfs, command line, zero page
//! acpi    RSDP, XSDT, FADT, MADT, DSDT
//! cpu     CPUID, MSRs, registers at the first instruction
//! machine all of it put together
//! ```

pub mod acpi;
pub mod cpu;
pub mod layout;
pub mod linux;
pub mod machine;

pub use linux::{Entry, Error, Source, load};

#[cfg(test)]
mod tests;
