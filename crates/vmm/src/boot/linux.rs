//! The Linux boot protocol: kernel (bzImage or vmlinux), initramfs, command line, zero page.
//!
//! The kernel is entered in 64-bit mode. A file that is no kernel, and memory that is too small,
//! are refused here with both sizes named, before any CPU exists.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

use linux_loader::configurator::{BootConfigurator as _, BootParams, linux::LinuxBootConfigurator};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader as _, KernelLoaderResult};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
};

use super::{acpi, layout};

/// What to boot.
#[derive(Debug)]
pub struct Source<'a> {
    /// A bzImage or an ELF vmlinux.
    pub kernel: &'a mut File,
    /// The first root, unpacked by the kernel.
    pub initramfs: Option<&'a mut File>,
    /// The kernel's command line, without a final zero.
    pub command_line: &'a str,
}

/// Where the first CPU starts; see [`super::cpu::registers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Guest address of the first instruction.
    pub instruction: u64,
    /// Guest address of the zero page.
    pub zero_page: u64,
}

/// The guest cannot be booted from what was given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is neither format, is damaged, or its parts lie outside the guest's memory.
    #[error("the kernel is no bootable bzImage or 64-bit vmlinux of at most {memory_mib} MiB")]
    Kernel {
        /// Memory of the guest.
        memory_mib: u64,
        /// What the loader found.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The kernel has no 64-bit entry point, or is older than protocol 2.12.
    #[error("the kernel has no 64-bit entry point; use a kernel for x86-64")]
    NoEntry,
    /// A file could not be read.
    #[error("could not read the {what}")]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Kernel and initramfs do not fit together.
    #[error(
        "the initramfs ({initramfs_mib} MiB) and the kernel (needs {kernel_mib} MiB) do not fit in \
         {memory_mib} MiB; give the machine more memory or shrink the initramfs"
    )]
    TooLarge {
        /// Size of the initramfs, rounded up.
        initramfs_mib: u64,
        /// What the kernel needs from address zero on, rounded up.
        kernel_mib: u64,
        /// Memory of the guest below 4 GiB.
        memory_mib: u64,
    },
    /// The command line is longer than the kernel reads, or holds a zero byte.
    #[error("the kernel command line has {bytes} bytes; it may have {max}, none of them zero")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Guest memory does not reach an address every machine has.
    #[error("the guest's memory does not reach {address:#x}; give the machine at least 64 MiB")]
    Memory {
        /// The address.
        address: u64,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The tables that describe the machine could not be written.
    #[error("could not describe the machine to the guest")]
    Acpi(#[from] acpi::Error),
}

/// What a kernel must be told of this machine, before the caller's own arguments: a machine with
/// reduced ACPI hardware is restarted through its ACPI register (Linux would try EFI and then a BIOS,
/// and hang), and there is no PCI to probe.
pub const MACHINE_ARGUMENTS: &str = "reboot=a pci=off";

const MIB: u64 = 1 << 20;
/// Loader type "none of the registered ones".
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel may use the heap behind the setup header; harmless in 64-bit mode, expected by some.
const CAN_USE_HEAP: u8 = 0x80;
const ELF_MAGIC: [u8; 4] = [0x7f, b'E', b'L', b'F'];
/// From the start of a loaded bzImage to its 64-bit entry point.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// Flag in `xloadflags`: the 64-bit entry point exists.
const XLF_KERNEL_64: u16 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Loads kernel, initramfs and tables into `memory`.
pub fn load(
    memory: &GuestMemoryMmap,
    source: Source<'_>,
    machine: &acpi::Machine,
) -> Result<Entry, Error> {
    let command_line = format!("{MACHINE_ARGUMENTS} {}", source.command_line);
    let command_line = command_line.as_bytes();
    if command_line.len() >= layout::COMMAND_LINE_MAX || command_line.contains(&0) {
        let max = layout::COMMAND_LINE_MAX - 1;
        return Err(Error::CommandLine {
            bytes: command_line.len(),
            max,
        });
    }
    let loaded = load_kernel(memory, source.kernel)?;
    let mut params = boot_params {
        hdr: header(&loaded),
        ..Default::default()
    };
    if let Some(initramfs) = source.initramfs {
        load_initramfs(memory, initramfs, kernel_end(&loaded), &mut params)?;
    }
    write(memory, layout::COMMAND_LINE, command_line)?;
    write(
        memory,
        layout::COMMAND_LINE + command_line.len() as u64,
        &[0],
    )?;
    params.hdr.cmd_line_ptr = u32::try_from(layout::COMMAND_LINE).expect("below 4 GiB");
    params.hdr.cmdline_size = u32::try_from(layout::COMMAND_LINE_MAX).expect("is small");
    params.acpi_rsdp_addr = acpi::write(memory, machine)?;
    describe_memory(memory, &mut params);
    let zero_page = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&zero_page, memory).map_err(|_| Error::Memory {
        address: layout::ZERO_PAGE,
        source: vm_memory::GuestMemoryError::InvalidGuestAddress(GuestAddress(layout::ZERO_PAGE)),
    })?;
    let offset = if loaded.setup_header.is_some() {
        BZIMAGE_ENTRY_64
    } else {
        0
    };
    Ok(Entry {
        instruction: loaded.kernel_load.0 + offset,
        zero_page: layout::ZERO_PAGE,
    })
}

fn load_kernel(memory: &GuestMemoryMmap, kernel: &mut File) -> Result<KernelLoaderResult, Error> {
    let mut magic = [0; 4];
    let read = |source| Error::Read {
        what: "kernel",
        source,
    };
    kernel.seek(SeekFrom::Start(0)).map_err(read)?;
    // A file shorter than this is refused by the loader below, with its reason.
    let _short = kernel.read_exact_at(&mut magic, 0);
    let himem = Some(GuestAddress(layout::KERNEL));
    let loaded = if magic == ELF_MAGIC {
        Elf::load(memory, None, kernel, himem)
    } else {
        BzImage::load(memory, None, kernel, himem)
    };
    let loaded = loaded.map_err(|source| Error::Kernel {
        memory_mib: low_memory(memory) / MIB,
        source,
    })?;
    match loaded.setup_header {
        Some(header) if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 => {
            Err(Error::NoEntry)
        }
        _ => Ok(loaded),
    }
}

/// The header the kernel reads in the zero page: its own, or one for a vmlinux, which has none.
fn header(loaded: &KernelLoaderResult) -> setup_header {
    let mut header = loaded.setup_header.unwrap_or_else(|| setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x20f,
        kernel_alignment: 0x20_0000,
        initrd_addr_max: 0x7fff_ffff,
        ..Default::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags |= CAN_USE_HEAP;
    header
}

/// The end of what the kernel occupies until it manages memory itself: a bzImage unpacks itself
/// at the address it prefers.
fn kernel_end(loaded: &KernelLoaderResult) -> u64 {
    let unpacked = loaded.setup_header.map_or(0, |header| {
        header
            .pref_address
            .saturating_add(u64::from(header.init_size))
    });
    loaded.kernel_end.max(unpacked)
}

fn load_initramfs(
    memory: &GuestMemoryMmap,
    file: &mut File,
    floor: u64,
    params: &mut boot_params,
) -> Result<(), Error> {
    let read = |source| Error::Read {
        what: "initramfs",
        source,
    };
    let len = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.seek(SeekFrom::Start(0)).map_err(read)?;
    let low = low_memory(memory);
    let ceiling = low.min(u64::from(params.hdr.initrd_addr_max) + 1);
    let too_large = || Error::TooLarge {
        initramfs_mib: len.div_ceil(MIB),
        kernel_mib: floor.div_ceil(MIB),
        memory_mib: low / MIB,
    };
    let start = ceiling.checked_sub(len).ok_or_else(too_large)? & !0xfff;
    if start < floor {
        return Err(too_large());
    }
    let bytes = usize::try_from(len).map_err(|_| too_large())?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, bytes)
        .map_err(|source| Error::Read {
            what: "initramfs",
            source: std::io::Error::other(source),
        })?;
    params.hdr.ramdisk_image = u32::try_from(start).map_err(|_| too_large())?;
    params.hdr.ramdisk_size = u32::try_from(len).map_err(|_| too_large())?;
    Ok(())
}

/// Tells the kernel which memory it may use.
fn describe_memory(memory: &GuestMemoryMmap, params: &mut boot_params) {
    let mut map = vec![(0, layout::LOW_USABLE_END, E820_RAM)];
    for area in [layout::ACPI_TABLES, layout::GENERATION] {
        map.push((area.base, area.len, E820_RESERVED));
    }
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::KERNEL);
        let end = region.start_addr().0 + region.len();
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    for (entry, (addr, size, r#type)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *r#type,
        };
    }
    params.e820_entries = u8::try_from(map.len()).expect("a machine has two regions of memory");
}

/// Bytes of the region that begins at zero.
fn low_memory(memory: &GuestMemoryMmap) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

fn write(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| Error::Memory { address, source })
}
