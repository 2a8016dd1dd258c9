//! Tripwires: nobody changes what lies on disk without noticing, and nothing damaged gets in.

use kvm_bindings::*;

use super::file::{Error, FORMAT_VERSION};
use super::*;

/// A small machine with recognisable contents, the same every time.
pub(crate) fn sample() -> MachineState {
    let cpuid = |function, ebx, ecx, edx| kvm_cpuid_entry2 {
        function,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let vcpu = VcpuState {
        cpuid: vec![
            cpuid(0, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
            cpuid(1, 0, 1 << 28 | 1 << 27, 1),
        ],
        msrs: vec![kvm_msr_entry {
            index: 0x10,
            data: 77,
            ..Default::default()
        }],
        regs: kvm_regs {
            rip: 0x1000,
            rax: 5,
            ..Default::default()
        },
        sregs: kvm_sregs {
            cr0: 0x11,
            ..Default::default()
        },
        xsave: Arc::new(kvm_xsave {
            region: [3; 1024],
            ..Default::default()
        }),
        xcrs: kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        },
        lapic: kvm_lapic_state::default(),
        debugregs: kvm_debugregs {
            dr6: 0xffff_0ff0,
            ..Default::default()
        },
        events: kvm_vcpu_events::default(),
        mp_state: kvm_mp_state { mp_state: 3 },
        tsc_khz: 2_500_000,
    };
    let chip = |chip_id| kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    MachineState {
        description: MachineDescription {
            memory_mib: 64,
            devices: BTreeMap::from([("serial".to_owned(), serde_json::json!({"divisor": 12}))]),
            host: HostFacts {
                vendor: "GenuineIntel".to_owned(),
                kernel: "6.1.0".to_owned(),
            },
        },
        vm: VmState {
            clock: kvm_clock_data {
                clock: 123_456_789,
                ..Default::default()
            },
            irqchips: [chip(0), chip(1), chip(2)],
        },
        vcpus: vec![vcpu.clone(), vcpu],
    }
}

#[test]
fn kernel_structures_have_the_sizes_on_disk() {
    let sizes = [
        size_of::<kvm_cpuid_entry2>(),
        size_of::<kvm_msr_entry>(),
        size_of::<kvm_regs>(),
        size_of::<kvm_sregs>(),
        size_of::<kvm_xsave>(),
        size_of::<kvm_xcrs>(),
        size_of::<kvm_lapic_state>(),
        size_of::<kvm_debugregs>(),
        size_of::<kvm_vcpu_events>(),
        size_of::<kvm_mp_state>(),
        size_of::<kvm_clock_data>(),
        size_of::<kvm_irqchip>(),
    ];
    assert_eq!(
        sizes,
        [40, 16, 144, 312, 4096, 392, 1024, 128, 64, 4, 48, 520],
        "the state format changed: raise FORMAT_VERSION and keep a golden file of the old one"
    );
}

#[test]
fn the_golden_file_of_version_1_is_what_we_write() {
    assert_eq!(FORMAT_VERSION, 1);
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/src/state/golden-v1.bin");
    let written = sample().encode();
    if std::env::var_os("FORKD_BLESS").is_some() {
        std::fs::write(golden, &written).unwrap();
    }
    let read = std::fs::read(golden).unwrap();
    assert!(
        read == written,
        "the state format changed: raise FORMAT_VERSION instead"
    );
    let state = MachineState::decode(&read).unwrap();
    assert_eq!(state.description, sample().description);
    assert_eq!(state.vcpus[1].regs.rip, 0x1000);
    assert_eq!(state.vm.clock.clock, 123_456_789);
}

#[test]
fn every_truncation_and_every_flipped_byte_is_refused() {
    let bytes = sample().encode();
    for len in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
        assert!(matches!(
            MachineState::decode(&bytes[..len]),
            Err(Error::Length { .. })
        ));
    }
    for at in (0..bytes.len()).step_by(61) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x40;
        assert!(MachineState::decode(&changed).is_err(), "byte {at}");
    }
}

/// Damage that carries a valid checksum: what an archive from a stranger may hold.
fn resealed(mut bytes: Vec<u8>) -> Result<MachineState, Error> {
    let end = bytes.len() - 32;
    let hash = blake3::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(hash.as_bytes());
    MachineState::decode(&bytes)
}

#[test]
fn damage_with_a_valid_checksum_never_panics() {
    let bytes = sample().encode();
    for at in 0..bytes.len().min(6000) {
        for value in [0, 0x7f, 0xff] {
            let mut changed = bytes.clone();
            changed[at] = value;
            _ = resealed(changed);
        }
    }
    let mut other = bytes.clone();
    other[8] = 9;
    assert!(matches!(resealed(other), Err(Error::Version { found: 9 })));
    let mut other = bytes.clone();
    other[12] = 33;
    assert!(matches!(resealed(other), Err(Error::Vcpus(33))));
    let mut other = bytes;
    other[0] = b'X';
    assert!(matches!(resealed(other), Err(Error::Magic { .. })));
}

#[test]
fn missing_features_are_named_and_mirrored_ones_ignored() {
    let state = sample();
    let mut host = state.vcpus[0].cpuid.clone();
    // OSXSAVE (bit 27) only mirrors what the guest has switched on.
    host[1].ecx = 1 << 28;
    assert_eq!(compat::check(&state, &host), Ok(()));
    host[1].ecx = 0;
    host[1].edx = 0;
    let missing = vec!["avx".to_owned(), "cpuid 1.edx bit 0".to_owned()];
    assert_eq!(
        compat::check(&state, &host),
        Err(compat::Error::Features(missing))
    );
    host[0].ebx = 0x6874_7541;
    host[0].edx = 0x6974_6e65;
    host[0].ecx = 0x444d_4163;
    let error = compat::check(&state, &host).unwrap_err();
    let ours = "AuthenticAMD".to_owned();
    assert_eq!(
        error,
        compat::Error::Vendor {
            theirs: "GenuineIntel".to_owned(),
            ours
        }
    );
}
