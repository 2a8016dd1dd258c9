//! Texts of several machines through the parsers, and one look at the machine at hand.

use super::*;

const CPUINFO: &str = "processor\t: 0\nmodel name\t: A CPU @ 2.0GHz\nflags\t\t: fpu vmxoff svm sse\n\n\
    processor\t: 1\nmodel name\t: A CPU @ 2.0GHz\nflags\t\t: fpu svm sse\n";

#[test]
fn processors() {
    let cpu = parse::cpu(CPUINFO);
    assert_eq!((cpu.model.as_str(), cpu.count), ("A CPU @ 2.0GHz", 2));
    assert_eq!(cpu.virtualization, Some(Virtualization::Svm));
    assert!(!cpu.is_guest);
    let cpu = parse::cpu("processor : 0\nflags : vmx hypervisor\n");
    assert_eq!(cpu.virtualization, Some(Virtualization::Vmx));
    assert!(cpu.is_guest);
    assert_eq!(parse::cpu(""), Cpu::default());
}

#[test]
fn memory_in_bytes() {
    let memory = parse::memory("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\n");
    assert_eq!(
        (memory.total_bytes, memory.available_bytes),
        (2 << 20, 1 << 20)
    );
    assert_eq!(parse::memory("nonsense"), Memory::default());
}

#[test]
fn cgroups_pure_mixed_and_old() {
    let pure = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(
        parse::cgroup_mounts(pure),
        (Some("/sys/fs/cgroup".into()), vec![])
    );
    let mixed = "1 0 8:1 / / rw - ext4 /dev/sda rw\n\
        40 30 0:30 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
        41 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        42 30 0:32 / /sys/fs/cgroup/my\\040unified rw - cgroup2 none rw\n";
    let (v2, v1) = parse::cgroup_mounts(mixed);
    assert_eq!(v2, Some("/sys/fs/cgroup/my unified".into()));
    assert_eq!(v1, ["cpu", "cpuacct"]);
    assert_eq!(parse::cgroup_mounts("short line"), (None, vec![]));
}

#[test]
fn versions_as_tools_print_them() {
    for (text, expected) in [
        (
            "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)",
            Some("7.2.22"),
        ),
        ("mmdebstrap 1.3.5", Some("1.3.5")),
        ("mkfs.erofs 1.5", Some("1.5")),
        ("mkfs.erofs (erofs-utils) 1.8.10-1", Some("1.8.10-1")),
        (
            "Debian 'dpkg-deb' package archive backend version 1.21.22 (amd64).",
            Some("1.21.22"),
        ),
        ("nftables v1.0.6 (Lester Gooch #5)", Some("1.0.6")),
        ("Firecracker v1.10.1\n", Some("1.10.1")),
        ("usage: tool [options] 2 files", None),
        ("", None),
    ] {
        assert_eq!(parse::version(text).as_deref(), expected, "{text}");
    }
}

#[test]
fn distributions_by_their_pretty_name() {
    let text = "NAME=\"Debian\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n";
    let name = parse::distribution(text);
    assert_eq!(name.as_deref(), Some("Debian GNU/Linux 12 (bookworm)"));
    assert_eq!(parse::distribution("PRETTY_NAME=\n"), None);
}

#[test]
fn devices_absent_usable_and_broken() {
    assert_eq!(
        Device::probe(Path::new("/dev/no-such-device")),
        Device::Absent
    );
    assert!(Device::probe(Path::new("/dev/null")).is_usable());
    let directory = Device::probe(Path::new("/"));
    assert!(matches!(directory, Device::Broken(_)), "{directory:?}");
}

#[test]
fn tools_are_executable_files_on_path() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("sh"), b"not executable").unwrap();
    let path = std::env::join_paths([dir.path(), Path::new("/bin")]).unwrap();
    assert_eq!(tool::find("sh", &path), Some("/bin/sh".into()));
    assert_eq!(tool::find("no-such-tool", &path), None);
    assert_eq!(find_tool("no-such-tool", "--version"), None);
    let cargo = find_tool("cargo", "--version").unwrap();
    assert!(cargo.version.is_some(), "{cargo:?}");
}

#[test]
fn this_machine_has_a_processor_memory_and_a_kernel() {
    let facts = Facts::collect();
    assert!(facts.cpu.count >= 1 && !facts.kernel.is_empty());
    assert!(facts.memory.total_bytes >= facts.memory.available_bytes);
    assert!(facts.memory.available_bytes > 0);
    println!("{facts:#?}");
}
