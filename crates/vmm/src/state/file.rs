//! The container of `state.bin`.
//!
//! ```text
//!   offset  size  field                                    all numbers little-endian
//!        0     8  magic "FKDSTATE"
//!        8     4  format version, 1
//!       12     4  number of vCPUs, n
//!       16     8  bytes after the header, without the checksum
//!       24     8  reserved, 0
//!       32     …  section 1: description (JSON), section 2: VM, n times section 3: vCPU
//!      end    32  blake3 of everything before it
//!
//!   section: kind u32, length u32, bytes; VM and vCPU bytes are tagged fields (tag u16, 0 u16,
//!   length u32, bytes), every field present, in ascending order of its tag
//! ```
//!
//! The sizes of all kernel structures are pinned by tests, and a golden file of each version must
//! stay readable: the format changes only together with [`FORMAT_VERSION`].

use std::sync::Arc;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_msr_entry};
use zerocopy::IntoBytes;

use super::fields::{Fields, put};
use super::{MachineDescription, MachineState, VcpuState, VmState};

/// The first bytes of a state file.
pub const MAGIC: [u8; 8] = *b"FKDSTATE";
/// The version of the format that this code writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Largest state file that is read: far above what 32 vCPUs and all devices need.
pub const BYTES_MAX: u64 = 16 << 20;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: u32 = 32;

const HEADER: usize = 32;
const HASH: usize = blake3::OUT_LEN;
const MSRS_MAX: usize = 4096;

const DESCRIPTION: u32 = 1;
const VM: u32 = 2;
const VCPU: u32 = 3;

/// Why bytes are no state of a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too short, or cut off.
    #[error(
        "state file has {found} bytes, expected {expected}: it is truncated, take or import the snapshot again"
    )]
    Length {
        /// Bytes there should be.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// Something else.
    #[error("not a state file: it begins with {found:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// Another version of the format.
    #[error(
        "state file has format version {found}, this program reads version {FORMAT_VERSION}: take the snapshot again with this version of forkd"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// The checksum does not match the contents.
    #[error(
        "state file is damaged: its checksum does not match, take or import the snapshot again"
    )]
    Checksum,
    /// A number of vCPUs that no machine has.
    #[error("state file has {0} vCPUs, a machine has 1 to {VCPUS_MAX}")]
    Vcpus(u32),
    /// A section is missing, cut off, or not expected.
    #[error("state file is malformed: section {0} is missing or cut off")]
    Section(u32),
    /// A field is missing, of another size, or not expected.
    #[error(
        "state file is malformed: field {field} of section {section} is missing or of another size"
    )]
    Field {
        /// Which section.
        section: &'static str,
        /// Which field.
        field: u16,
    },
    /// The description is no description.
    #[error("state file is malformed: its description cannot be read: {0}")]
    Description(String),
}

impl MachineState {
    /// The machine as bytes of a state file.
    pub fn encode(&self) -> Vec<u8> {
        let description = serde_json::to_vec(&self.description);
        let description = description.expect("strings and numbers are always valid JSON");
        let mut out = Vec::with_capacity(64 << 10);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&(self.vcpus.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        section(&mut out, DESCRIPTION, &description);
        section(&mut out, VM, &encode_vm(&self.vm));
        self.vcpus
            .iter()
            .for_each(|vcpu| section(&mut out, VCPU, &encode_vcpu(vcpu)));
        let body = (out.len() - HEADER) as u64;
        out[16..24].copy_from_slice(&body.to_le_bytes());
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out
    }

    /// Reads a state file. Whatever [`MachineState::encode`] cannot have written is refused; nothing
    /// panics: the file comes from a disk or an archive.
    pub fn decode(bytes: &[u8]) -> Result<MachineState, Error> {
        let (vcpu_count, body) = open(bytes)?;
        let mut rest = body;
        let description = next(&mut rest, DESCRIPTION)?;
        let description: MachineDescription =
            serde_json::from_slice(description).map_err(|e| Error::Description(e.to_string()))?;
        let vm = decode_vm(next(&mut rest, VM)?)?;
        let vcpus: Result<Vec<_>, _> = (0..vcpu_count)
            .map(|_| decode_vcpu(next(&mut rest, VCPU)?))
            .collect();
        if !rest.is_empty() {
            return Err(Error::Section(VCPU + 1));
        }
        Ok(MachineState {
            description,
            vm,
            vcpus: vcpus?,
        })
    }
}

/// Checks header and checksum; answers the number of vCPUs and the sections.
fn open(bytes: &[u8]) -> Result<(u32, &[u8]), Error> {
    let found = bytes.len() as u64;
    let least = (HEADER + HASH) as u64;
    if found < least {
        return Err(Error::Length {
            expected: least,
            found,
        });
    }
    let magic: [u8; 8] = array(bytes, 0);
    if magic != MAGIC {
        return Err(Error::Magic { found: magic });
    }
    let version = u32::from_le_bytes(array(bytes, 8));
    if version != FORMAT_VERSION {
        return Err(Error::Version { found: version });
    }
    let expected = u64::from_le_bytes(array(bytes, 16)).saturating_add(least);
    if found != expected {
        return Err(Error::Length { expected, found });
    }
    let (contents, hash) = bytes.split_at(bytes.len() - HASH);
    if blake3::hash(contents).as_bytes().as_slice() != hash {
        return Err(Error::Checksum);
    }
    let vcpus = u32::from_le_bytes(array(bytes, 12));
    if !(1..=VCPUS_MAX).contains(&vcpus) {
        return Err(Error::Vcpus(vcpus));
    }
    Ok((vcpus, &contents[HEADER..]))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn section(out: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn next<'a>(rest: &mut &'a [u8], kind: u32) -> Result<&'a [u8], Error> {
    let (head, after) = rest.split_at_checked(8).ok_or(Error::Section(kind))?;
    let found = u32::from_le_bytes(array(head, 0));
    let len = u32::from_le_bytes(array(head, 4)) as usize;
    let (bytes, after) = after.split_at_checked(len).ok_or(Error::Section(kind))?;
    if found != kind {
        return Err(Error::Section(kind));
    }
    *rest = after;
    Ok(bytes)
}

fn encode_vm(vm: &VmState) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, 1, vm.clock.as_bytes());
    for (tag, chip) in (2..).zip(&vm.irqchips) {
        put(&mut out, tag, chip.as_bytes());
    }
    out
}

fn decode_vm(bytes: &[u8]) -> Result<VmState, Error> {
    let mut fields = Fields::new(bytes, "vm");
    let clock = fields.one(1)?;
    let irqchips = [fields.one(2)?, fields.one(3)?, fields.one(4)?];
    fields.finish()?;
    Ok(VmState { clock, irqchips })
}

fn encode_vcpu(vcpu: &VcpuState) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, 1, vcpu.cpuid.as_bytes());
    put(&mut out, 2, vcpu.msrs.as_bytes());
    put(&mut out, 3, vcpu.regs.as_bytes());
    put(&mut out, 4, vcpu.sregs.as_bytes());
    put(&mut out, 5, vcpu.xsave.as_bytes());
    put(&mut out, 6, vcpu.xcrs.as_bytes());
    put(&mut out, 7, vcpu.lapic.as_bytes());
    put(&mut out, 8, vcpu.debugregs.as_bytes());
    put(&mut out, 9, vcpu.events.as_bytes());
    put(&mut out, 10, vcpu.mp_state.as_bytes());
    put(&mut out, 11, &vcpu.tsc_khz.to_le_bytes());
    out
}

fn decode_vcpu(bytes: &[u8]) -> Result<VcpuState, Error> {
    let mut fields = Fields::new(bytes, "vcpu");
    let vcpu = VcpuState {
        cpuid: fields.many::<kvm_cpuid_entry2>(1, KVM_MAX_CPUID_ENTRIES)?,
        msrs: fields.many::<kvm_msr_entry>(2, MSRS_MAX)?,
        regs: fields.one(3)?,
        sregs: fields.one(4)?,
        xsave: Arc::new(fields.one(5)?),
        xcrs: fields.one(6)?,
        lapic: fields.one(7)?,
        debugregs: fields.one(8)?,
        events: fields.one(9)?,
        mp_state: fields.one(10)?,
        tsc_khz: fields.one(11)?,
    };
    fields.finish()?;
    Ok(vcpu)
}
