//! Where things are in the guest's address space.
//!
//! ```text
//! 0x0000_0000  RAM
//!   0x0000_0500  GDT                  0x0000_7000  zero page
//!   0x0000_9000  page tables (3)      0x0002_0000  command line
//!   0x000a_0000  (not usable by the guest: firmware area)
//!   0x000e_0000  ACPI tables          0x000f_f000  generation identifier
//!   0x0010_0000  kernel               top of low RAM: initramfs
//! 0xc000_0000  end of low RAM at the latest
//! 0xd000_0000  virtio devices, one page each
//! 0xfec0_0000  I/O APIC               0xfee0_0000  local APICs
//! 0x1_0000_0000  the rest of RAM
//! ```

use crate::bus::Range;

/// End of RAM below 4 GiB; more memory than this continues at [`HIGH_RAM_BASE`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where the second part of RAM begins.
pub const HIGH_RAM_BASE: u64 = 1 << 32;

/// Global descriptor table of the first CPU.
pub const GDT: u64 = 0x500;
/// The boot parameters of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Three pages of page tables that map the first GiB to itself.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line in bytes, with its final zero. Linux's own limit on x86.
pub const COMMAND_LINE_MAX: usize = 2048;
/// First stack of a kernel that wants one before it has its own.
pub const BOOT_STACK: u64 = 0x8ff0;
/// End of the memory below the firmware area that the guest may use.
pub const LOW_USABLE_END: u64 = 0xa_0000;
/// The ACPI tables, the RSDP first. Inside the area firmware is searched in.
pub const ACPI_TABLES: Range = Range {
    base: 0xe_0000,
    len: 0x1_f000,
};
/// The page that holds the generation identifier.
pub const GENERATION: Range = Range {
    base: 0xf_f000,
    len: 0x1000,
};
/// Where the kernel is loaded and memory is usable again.
pub const KERNEL: u64 = 0x10_0000;

/// The registers of virtio device `slot`.
pub const fn virtio(slot: u8) -> Range {
    Range {
        base: 0xd000_0000 + slot as u64 * VIRTIO_LEN,
        len: VIRTIO_LEN,
    }
}
const VIRTIO_LEN: u64 = 0x1000;

/// The I/O APIC that KVM emulates.
pub const IO_APIC: u64 = 0xfec0_0000;
/// The local APICs that KVM emulates.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Three pages that Intel's virtualisation needs somewhere unused (`KVM_SET_TSS_ADDR`).
pub const TSS: u64 = 0xfffb_d000;
/// One page that Intel's virtualisation needs somewhere unused (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const IDENTITY_MAP: u64 = 0xfffb_c000;

/// I/O ports of the serial console.
pub const SERIAL: Range = Range {
    base: 0x3f8,
    len: 8,
};
/// I/O ports of the keyboard controller, of which only the reset line exists.
pub const KEYBOARD: Range = Range { base: 0x60, len: 5 };
/// I/O ports of the power register block: sleep control, sleep status, reset.
pub const POWER: Range = Range {
    base: 0x600,
    len: 3,
};

/// Interrupt of the serial console.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt by which the guest learns that its generation changed.
pub const GENERATION_GSI: u32 = 5;
/// Interrupt of virtio device `slot`, each line its own. See [`VIRTIO_SLOTS`].
pub const fn virtio_gsi(slot: u8) -> u32 {
    6 + slot as u32
}
/// How many virtio devices there can be: the I/O APIC has 24 inputs.
pub const VIRTIO_SLOTS: u8 = 18;

/// How `bytes` of RAM are laid out: `(guest address, bytes)`, one range or two.
pub fn ram(bytes: u64) -> Vec<Range> {
    let mut ranges = vec![Range {
        base: 0,
        len: bytes.min(LOW_RAM_END),
    }];
    if bytes > LOW_RAM_END {
        ranges.push(Range {
            base: HIGH_RAM_BASE,
            len: bytes - LOW_RAM_END,
        });
    }
    ranges
}
