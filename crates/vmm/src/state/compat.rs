//! Whether this host can go on with a machine that was frozen on another.
//!
//! A guest has seen its CPU's features and relies on them. So every feature it was shown must be
//! there; more is harmless, because it is not shown. The answer names the difference.

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Kvm;

use super::{HostFacts, MachineState};
use crate::kvm::{Error as KvmError, failed};

/// Why a machine cannot go on here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Another maker's CPU.
    #[error(
        "the machine was frozen on a {theirs} CPU and this host has a {ours} CPU: restore it on a {theirs} host"
    )]
    Vendor {
        /// Where it was frozen.
        theirs: String,
        /// Here.
        ours: String,
    },
    /// Features are missing.
    #[error("this host lacks CPU features that the machine has seen: {}: restore it on a host that has them, or take the snapshot on this one", .0.join(", "))]
    Features(Vec<String>),
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// The CPUID words in which each bit is a feature.
const FEATURE_WORDS: [(u32, u32, Register, &str); 11] = [
    (0x1, 0, Register::Ecx, "1.ecx"),
    (0x1, 0, Register::Edx, "1.edx"),
    (0x7, 0, Register::Ebx, "7.ebx"),
    (0x7, 0, Register::Ecx, "7.ecx"),
    (0x7, 0, Register::Edx, "7.edx"),
    (0x7, 1, Register::Eax, "7.1.eax"),
    (0xd, 0, Register::Eax, "xcr0"),
    (0xd, 1, Register::Eax, "xsave"),
    (0x4000_0001, 0, Register::Eax, "kvm"),
    (0x8000_0001, 0, Register::Ecx, "80000001.ecx"),
    (0x8000_0001, 0, Register::Edx, "80000001.edx"),
];

/// Bits that are not features of the host: the guest's own settings mirrored into CPUID (OSXSAVE,
/// OSPKE), the hypervisor bit and the TSC-deadline timer and x2APIC, which KVM emulates anywhere.
const NOT_FEATURES: [(&str, u32); 2] = [
    ("1.ecx", 1 << 27 | 1 << 31 | 1 << 24 | 1 << 21),
    ("7.ecx", 1 << 4),
];

/// Names of the features people know by name.
const NAMES: [(&str, u32, &str); 24] = [
    ("1.ecx", 0, "sse3"),
    ("1.ecx", 5, "vmx"),
    ("1.ecx", 12, "fma"),
    ("1.ecx", 19, "sse4_1"),
    ("1.ecx", 20, "sse4_2"),
    ("1.ecx", 22, "movbe"),
    ("1.ecx", 23, "popcnt"),
    ("1.ecx", 25, "aes"),
    ("1.ecx", 28, "avx"),
    ("1.ecx", 29, "f16c"),
    ("1.ecx", 30, "rdrand"),
    ("7.ebx", 3, "bmi1"),
    ("7.ebx", 5, "avx2"),
    ("7.ebx", 8, "bmi2"),
    ("7.ebx", 16, "avx512f"),
    ("7.ebx", 18, "rdseed"),
    ("7.ebx", 29, "sha_ni"),
    ("7.ebx", 30, "avx512bw"),
    ("7.ebx", 31, "avx512vl"),
    ("7.ecx", 11, "avx512_vnni"),
    ("7.ecx", 16, "la57"),
    ("7.edx", 22, "amx_bf16"),
    ("80000001.ecx", 2, "svm"),
    ("80000001.edx", 26, "pdpe1gb"),
];

/// What this host can show a guest.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    Ok(cpuid
        .map_err(failed("list the CPU's features"))?
        .as_slice()
        .to_vec())
}

/// Facts about this host.
pub fn host_facts(supported: &[kvm_cpuid_entry2]) -> HostFacts {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    HostFacts {
        vendor: vendor(supported),
        kernel: release,
    }
}

/// Whether a machine can go on where `supported` is all there is.
pub fn check(state: &MachineState, supported: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let (theirs, ours) = (vendor(&state.vcpus[0].cpuid), vendor(supported));
    if theirs != ours {
        return Err(Error::Vendor { theirs, ours });
    }
    let mut missing: Vec<String> = state
        .vcpus
        .iter()
        .flat_map(|vcpu| missing(&vcpu.cpuid, supported))
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Error::Features(missing))
    }
}

fn missing(seen: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut names = Vec::new();
    for (leaf, index, register, word) in FEATURE_WORDS {
        let mirrored = NOT_FEATURES
            .iter()
            .find(|(w, _)| *w == word)
            .map_or(0, |(_, bits)| *bits);
        let seen = read(seen, leaf, index, register);
        let lacking = seen & !read(supported, leaf, index, register) & !mirrored;
        let bits = (0..32).filter(|bit| lacking & 1 << bit != 0);
        names.extend(bits.map(|bit| name(word, bit)));
    }
    names
}

fn name(word: &str, bit: u32) -> String {
    let known = NAMES.iter().find(|(w, b, _)| *w == word && *b == bit);
    known.map_or_else(
        || format!("cpuid {word} bit {bit}"),
        |(_, _, name)| (*name).to_owned(),
    )
}

fn read(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32, register: Register) -> u32 {
    let entry = entries
        .iter()
        .find(|entry| entry.function == leaf && entry.index == index);
    entry.map_or(0, |entry| match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    })
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let words = [Register::Ebx, Register::Edx, Register::Ecx];
    let bytes: Vec<u8> = words
        .into_iter()
        .flat_map(|register| read(entries, 0, 0, register).to_le_bytes())
        .collect();
    String::from_utf8_lossy(&bytes)
        .trim_end_matches('\0')
        .to_owned()
}
