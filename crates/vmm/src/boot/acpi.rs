//! ACPI tables of a hardware-reduced machine: no legacy timer, no PCI, devices named in the DSDT.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    PackageBuilder, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::layout;

const OEM: [u8; 6] = *b"FORKD\0";
const OEM_TABLE: [u8; 8] = *b"FORKDVMM";
const OEM_REVISION: u32 = 1;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that stands for "off".
pub const SLEEP_TYPE_OFF: u8 = 5;

/// What the tables describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Number of vCPUs, 1 to 32. Their APIC ids count from zero.
    pub cpus: u8,
    /// Number of virtio devices, in slots counted from zero.
    pub virtio: u8,
}

/// The tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tables have outgrown their area.
    #[error("acpi tables of {bytes} bytes do not fit in {max}")]
    TooLarge {
        /// Their size.
        bytes: u64,
        /// The size of the area.
        max: u64,
    },
    /// Guest memory does not hold the area.
    #[error("the guest's memory does not reach the acpi tables at {address:#x}")]
    Memory {
        /// Address of the table.
        address: u64,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Writes all tables and returns the guest address of the first, the RSDP.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine) -> Result<u64, Error> {
    let mut area = Area {
        memory,
        next: layout::ACPI_TABLES.base,
    };
    let rsdp_at = area.reserve(Rsdp::len())?;
    let dsdt_at = area.put(dsdt(machine).as_slice())?;
    let fadt_at = area.put(&bytes(&fadt(dsdt_at)))?;
    let madt_at = area.put(&bytes(&madt(machine)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    let xsdt_at = area.put(&bytes(&xsdt))?;
    area.put_at(rsdp_at, &bytes(&Rsdp::new(OEM, xsdt_at)))?;
    Ok(rsdp_at)
}

struct Area<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Area<'_> {
    fn reserve(&mut self, len: usize) -> Result<u64, Error> {
        let at = self.next;
        self.next = (at + len as u64).next_multiple_of(64);
        let used = self.next - layout::ACPI_TABLES.base;
        let max = layout::ACPI_TABLES.len;
        if used > max {
            Err(Error::TooLarge { bytes: used, max })
        } else {
            Ok(at)
        }
    }

    fn put(&mut self, table: &[u8]) -> Result<u64, Error> {
        let at = self.reserve(table.len())?;
        self.put_at(at, table)?;
        Ok(at)
    }

    fn put_at(&self, address: u64, table: &[u8]) -> Result<(), Error> {
        self.memory
            .write_slice(table, GuestAddress(address))
            .map_err(|source| Error::Memory { address, source })
    }
}

#[derive(Default)]
struct Sink(Vec<u8>);

impl AmlSink for Sink {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Sink::default();
    table.to_aml_bytes(&mut sink);
    sink.0
}

fn port(offset: u64) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        layout::POWER.base + offset,
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    // No VGA, no ASPM, no CMOS clock: nothing of the PC is to be probed.
    fadt.iapc_boot_arch = ((1 << 2) | (1 << 4) | (1 << 5)).into();
    fadt.sleep_control_reg = port(0);
    fadt.sleep_status_reg = port(1);
    fadt.reset_reg = port(2);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"forkdvmm").into();
    fadt.finalize()
}

fn madt(machine: &Machine) -> MADT {
    let local =
        LocalInterruptController::Address(u32::try_from(layout::LOCAL_APIC).expect("below 4 GiB"));
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local);
    for cpu in 0..machine.cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    let io_apic = u32::try_from(layout::IO_APIC).expect("below 4 GiB");
    madt.add_structure(IoApic::new(0, io_apic, 0));
    madt
}

fn dsdt(machine: &Machine) -> Sdt {
    let mut body = Vec::new();
    for slot in 0..machine.virtio {
        body.extend(virtio(slot));
    }
    body.extend(serial());
    body.extend(generation());
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&Scope::raw(Path::new("\\_SB_"), body));
    let off = Package::new(vec![&SLEEP_TYPE_OFF]);
    table.append_slice(&bytes(&Name::new(Path::new("\\_S5_"), &off)));
    table
}

fn virtio(slot: u8) -> Vec<u8> {
    let range = layout::virtio(slot);
    let memory = Memory32Fixed::new(
        true,
        u32::try_from(range.base).expect("below 4 GiB"),
        u32::try_from(range.len).expect("one page"),
    );
    let interrupt = Interrupt::new(true, true, false, false, layout::virtio_gsi(slot));
    let name = format!("VR{slot:02}");
    bytes(&Device::new(
        Path::new(&name),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &slot),
            &Name::new(Path::new("_CCA"), &1u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&memory, &interrupt]),
            ),
        ],
    ))
}

fn serial() -> Vec<u8> {
    let base = u16::try_from(layout::SERIAL.base).expect("a port");
    let len = u8::try_from(layout::SERIAL.len).expect("eight ports");
    let ports = IO::new(base, base, 1, len);
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    bytes(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_DDN"), &"COM1"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&ports, &interrupt]),
            ),
        ],
    ))
}

/// The generation identifier, and the event device that announces a new one.
fn generation() -> Vec<u8> {
    let mut address = PackageBuilder::new();
    address.add_element(&u32::try_from(layout::GENERATION.base).expect("below 4 GiB"));
    address.add_element(&0u32);
    let mut out = bytes(&Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"VMGENCTR"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &address),
        ],
    ));
    let interrupt = Interrupt::new(true, true, false, false, layout::GENERATION_GSI);
    let identifier = Path::new("\\_SB_.VGEN");
    let changed = Notify::new(&identifier, &0x80u8);
    let mine = Equal::new(&Arg(0), &layout::GENERATION_GSI);
    out.extend(bytes(&Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&If::new(&mine, vec![&changed])],
            ),
        ],
    )));
    out
}
