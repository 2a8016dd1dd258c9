//! Debian's stock cloud kernel boots to user space and ends as it wishes.

use forkd_wire::vmm::Exit;

use crate::guest::{Guest, Spec};
use crate::node::lab;

#[test]
fn stock_kernel_reaches_user_space() {
    let Some(_) = lab() else { return };
    let mut guest = Guest::boot(&Spec::new("clock,devices,acpi,interrupts,poweroff"), None);
    let userspace = guest.wait("userspace");
    println!("figure boot_to_userspace_ms {}", guest.elapsed_ms());
    assert!(userspace.contains("cloud-amd64 cpus 1"), "{userspace}");
    assert_eq!(guest.wait("clock"), "kvm-clock");
    guest.wait("bye");
    assert_eq!(guest.ended(), Exit::PowerOff);
    println!("figure boot_to_poweroff_ms {}", guest.elapsed_ms());
    let text = guest.printed();
    assert!(text.contains("lab: device 0x0002"), "no disk:\n{text}");
    assert!(text.contains("lab: device 0x0013"), "no sockets:\n{text}");
    assert!(text.contains("lab: device 0x0004"), "no entropy:\n{text}");
    assert!(
        text.contains("lab: acpi VMGENCTR"),
        "no generation identifier:\n{text}"
    );
    println!("{text}");
}

#[test]
fn two_cpus_come_up_and_a_restart_is_reported() {
    let Some(_) = lab() else { return };
    let spec = Spec {
        cpus: 2,
        memory_mib: 512,
        ..Spec::new("reboot")
    };
    let mut guest = Guest::boot(&spec, None);
    let userspace = guest.wait("userspace");
    println!(
        "figure boot_two_cpus_to_userspace_ms {}",
        guest.elapsed_ms()
    );
    assert!(userspace.ends_with("cpus 2"), "{userspace}");
    guest.wait("bye");
    assert_eq!(guest.ended(), Exit::Reset);
}

#[test]
fn one_cpu_restarts() {
    let Some(_) = lab() else { return };
    let mut guest = Guest::boot(&Spec::new("reboot"), None);
    guest.wait("bye");
    assert_eq!(guest.ended(), Exit::Reset);
}

#[test]
fn the_least_memory_is_enough() {
    let Some(_) = lab() else { return };
    let spec = Spec {
        memory_mib: 96,
        ..Spec::new("memory,poweroff")
    };
    let mut guest = Guest::boot(&spec, None);
    let kib: u64 = guest.wait("memory").parse().unwrap();
    println!("figure memory_of_96_mib_kib {kib}");
    assert!((20_000..96 << 10).contains(&kib), "{kib} KiB");
    assert_eq!(guest.ended(), Exit::PowerOff);
}
