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
    assert!(text.contains("lab: acpi VMGENCTR"), "no generation identifier:\n{text}");
}
