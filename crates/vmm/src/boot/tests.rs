//! Tables as the guest reads them, and files that are refused.

use std::fs::File;
use std::io::Write as _;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::acpi::Machine;
use super::*;

fn memory(mib: u64) -> GuestMemoryMmap {
    let ranges: Vec<_> = layout::ram(mib << 20)
        .into_iter()
        .map(|range| (GuestAddress(range.base), range.len as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A bzImage of `payload` bytes, with as much of a header as loaders look at.
fn bzimage(payload: usize) -> Vec<u8> {
    let mut image = vec![0; 1024 + payload];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x200_0000u32.to_le_bytes());
    image
}

fn source<'a>(kernel: &'a mut File, initramfs: Option<&'a mut File>) -> Source<'a> {
    Source {
        kernel,
        initramfs,
        command_line: "console=ttyS0",
    }
}

const MACHINE: Machine = Machine { cpus: 2, virtio: 4 };

fn word<const N: usize>(memory: &GuestMemoryMmap, at: u64) -> u64 {
    let mut bytes = [0; 8];
    memory
        .read_slice(&mut bytes[..N], GuestAddress(at))
        .unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn a_kernel_is_entered_in_64_bit_mode_with_all_it_must_know() {
    let memory = memory(4096);
    let mut initramfs = file(&[7; 5000]);
    let entry = load(
        &memory,
        source(&mut file(&bzimage(4096)), Some(&mut initramfs)),
        &MACHINE,
    )
    .unwrap();
    assert_eq!(
        entry,
        Entry {
            instruction: 0x10_0200,
            zero_page: layout::ZERO_PAGE
        }
    );
    let zero = layout::ZERO_PAGE;
    assert_eq!(word::<4>(&memory, zero + 0x228), layout::COMMAND_LINE);
    let start = word::<4>(&memory, zero + 0x218);
    assert_eq!(word::<4>(&memory, zero + 0x21c), 5000);
    assert_eq!(start % 4096, 0);
    assert!(
        start > 0x7000_0000 && start < 0x8000_0000,
        "{start:#x}: below the kernel's limit"
    );
    assert_eq!(word::<1>(&memory, start + 4999), 7);
    assert_eq!(word::<8>(&memory, zero + 0x70), layout::ACPI_TABLES.base);
    let entries: Vec<(u64, u64, u64)> = (0..word::<1>(&memory, zero + 0x1e8))
        .map(|index| zero + 0x2d0 + index * 20)
        .map(|at| {
            (
                word::<8>(&memory, at),
                word::<8>(&memory, at + 8),
                word::<4>(&memory, at + 16),
            )
        })
        .collect();
    let ram: u64 = entries
        .iter()
        .filter(|entry| entry.2 == 1)
        .map(|entry| entry.1)
        .sum();
    assert_eq!(
        ram,
        (4096 << 20) - (layout::KERNEL - layout::LOW_USABLE_END)
    );
    assert!(entries.contains(&(layout::GENERATION.base, 4096, 2)));
    assert_eq!(entries.last().unwrap().0, layout::HIGH_RAM_BASE);
}

#[test]
fn tables_add_up_and_point_to_each_other() {
    let memory = memory(64);
    let rsdp = acpi::write(
        &memory,
        &Machine {
            cpus: 32,
            virtio: 18,
        },
    )
    .unwrap();
    let sum = |at: u64, len: u64| {
        let mut bytes = vec![0; len as usize];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    };
    assert_eq!(word::<8>(&memory, rsdp), u64::from_le_bytes(*b"RSD PTR "));
    assert_eq!(sum(rsdp, 36), 0);
    let xsdt = word::<8>(&memory, rsdp + 24);
    assert_eq!(word::<4>(&memory, xsdt + 4), 36 + 2 * 8);
    let names: Vec<u64> = (0..2)
        .map(|index| word::<8>(&memory, xsdt + 36 + index * 8))
        .inspect(|table| assert_eq!(sum(*table, word::<4>(&memory, table + 4)), 0))
        .map(|table| word::<4>(&memory, table))
        .collect();
    assert_eq!(
        names,
        [b"FACP", b"APIC"].map(|name| u64::from(u32::from_le_bytes(*name)))
    );
    assert_eq!(sum(xsdt, word::<4>(&memory, xsdt + 4)), 0);
    let fadt = word::<8>(&memory, xsdt + 36);
    let dsdt = word::<8>(&memory, fadt + 140);
    assert_eq!(sum(dsdt, word::<4>(&memory, dsdt + 4)), 0);
    assert_eq!(
        word::<8>(&memory, fadt + 116 + 4),
        layout::POWER.base + 2,
        "the reset register"
    );
}

#[test]
fn what_cannot_boot_is_refused_with_its_reason() {
    let memory = memory(64);
    let refuse = |kernel: &[u8], initramfs: Option<usize>| {
        let mut initramfs = initramfs.map(|len| file(&vec![1; len]));
        load(
            &memory,
            source(&mut file(kernel), initramfs.as_mut()),
            &MACHINE,
        )
        .unwrap_err()
        .to_string()
    };
    for garbage in [
        b"".as_slice(),
        b"#!/bin/sh\n",
        &[0; 4096],
        b"\x7fELF nothing more",
    ] {
        assert!(
            refuse(garbage, None).contains("no bootable bzImage"),
            "{garbage:?}"
        );
    }
    let mut old = bzimage(100);
    old[0x236] = 0;
    assert!(refuse(&old, None).contains("no 64-bit entry"));
    assert!(refuse(&bzimage(100 << 20), None).contains("at most 64 MiB"));
    let error = refuse(&bzimage(100), Some(20 << 20));
    assert!(
        error.contains("initramfs (20 MiB)") && error.contains("in 64 MiB"),
        "{error}"
    );
    let long = "x".repeat(layout::COMMAND_LINE_MAX);
    for command_line in [long.as_str(), "a\0b"] {
        let mut kernel = file(&bzimage(100));
        let source = Source {
            kernel: &mut kernel,
            initramfs: None,
            command_line,
        };
        assert!(matches!(
            load(&memory, source, &MACHINE),
            Err(Error::CommandLine { .. })
        ));
    }
}

#[test]
fn cpus_are_told_apart_and_async_faults_are_hidden() {
    let entry = |function, index, eax| kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ..Default::default()
    };
    let supported = CpuId::from_entries(&[
        entry(1, 0, 0),
        entry(0xb, 0, 0),
        entry(0xb, 1, 0),
        entry(0xa, 0, 7),
        entry(0x4000_0001, 0, u32::MAX),
    ])
    .unwrap();
    let tables = cpu::cpuid(&supported, 5, 6);
    let tables = tables.as_slice();
    assert_eq!(tables[0].ebx >> 24, 5);
    assert_eq!((tables[0].ebx >> 16) & 0xff, 6);
    assert_ne!(tables[0].ecx & (1 << 24), 0, "deadline timer");
    assert_eq!((tables[1].edx, tables[2].edx), (5, 5));
    assert_eq!((tables[2].eax, tables[2].ebx), (3, 6));
    assert_eq!(tables[3].eax, 0, "no counters");
    assert_eq!(!tables[4].eax, (1 << 4) | (1 << 10) | (1 << 14));
}

#[test]
fn the_layout_has_no_overlaps() {
    let areas = [
        (layout::GDT, 40),
        (layout::ZERO_PAGE, 4096),
        (layout::PAGE_TABLES, 3 * 4096),
        (layout::COMMAND_LINE, layout::COMMAND_LINE_MAX as u64),
        (layout::LOW_USABLE_END, 0),
        (layout::ACPI_TABLES.base, layout::ACPI_TABLES.len),
        (layout::GENERATION.base, layout::GENERATION.len),
        (layout::KERNEL, 0),
        (layout::LOW_RAM_END, 0),
        (
            layout::virtio(0).base,
            u64::from(layout::VIRTIO_SLOTS) * 4096,
        ),
        (layout::IO_APIC, 4096),
        (layout::LOCAL_APIC, 4096),
        (layout::HIGH_RAM_BASE, 0),
    ];
    for pair in areas.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
    }
    assert_eq!(layout::virtio_gsi(layout::VIRTIO_SLOTS - 1), 23);
    assert_eq!(layout::LOW_RAM_END, crate::memory::LOW_RAM_END);
    assert_eq!(layout::HIGH_RAM_BASE, crate::memory::HIGH_RAM);
}
