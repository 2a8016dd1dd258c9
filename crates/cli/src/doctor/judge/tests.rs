//! Facts of a host, and what the doctor says of them.

use std::path::PathBuf;

use forkd_host::facts::{Cgroup, Cpu, Memory, Tool, Virtualization};

use super::*;

fn good() -> Findings {
    let place = |path: &str| Place {
        path: PathBuf::from(path),
        problem: None,
        free_bytes: Some(100 << 30),
    };
    Findings {
        engine: EngineName::Auto,
        facts: Facts {
            cpu: Cpu {
                model: "CPU".into(),
                count: 2,
                virtualization: Some(Virtualization::Svm),
                is_guest: false,
            },
            kernel: "6.1.0".into(),
            distribution: Some("Debian".into()),
            memory: Memory {
                total_bytes: 8 << 30,
                available_bytes: 4 << 30,
            },
            cgroup: Cgroup {
                v2: Some("/sys/fs/cgroup".into()),
                controllers: ["cpu", "memory", "pids", "io"].map(String::from).to_vec(),
                v1_controllers: Vec::new(),
            },
            kvm: Device::Usable,
            tun: Device::Usable,
            vhost_vsock: Device::Absent,
            vhost_net: Device::Absent,
            uid: 0,
            user_namespaces_max: Some(1000),
            open_files: (Some(1024), Some(1 << 20)),
        },
        arch: "x86_64",
        qemu: Some(Tool {
            path: "/usr/bin/qemu".into(),
            version: Some("7.2.22".into()),
        }),
        firecracker: None,
        vmm: Some("/usr/bin/forkd-vmm".into()),
        image_tools: vec![("mmdebstrap", "mmdebstrap", true), ("apt-get", "apt", true)],
        image_built: false,
        kernels: Vec::new(),
        agent: Ok("/usr/lib/forkd/forkd-agent".into()),
        nft: true,
        v6: V6::Yes,
        data: place("/var/lib/forkd"),
        run: place("/run/forkd"),
        left_behind: Vec::new(),
        daemon: Daemon::NotAsked,
    }
}

/// The check of a name after a change to a good host.
fn after(name: &str, change: impl FnOnce(&mut Findings)) -> Check {
    let mut found = good();
    change(&mut found);
    let checks = judge(&found);
    let check = checks.into_iter().find(|check| check.name == name);
    check.unwrap_or_else(|| panic!("no check {name}"))
}

fn expect(name: &str, status: Status, part: &str, change: impl FnOnce(&mut Findings)) {
    let check = after(name, change);
    assert_eq!(check.status, status, "{check:?}");
    let told = format!(
        "{} {}",
        check.detail,
        check.remedy.clone().unwrap_or_default()
    );
    assert!(told.contains(part), "{told}");
    assert!(
        status == Status::Ok || check.remedy.is_some(),
        "no remedy: {check:?}"
    );
}

#[test]
fn a_good_host_has_nothing_to_say() {
    for check in judge(&good()) {
        assert_eq!(check.status, Status::Ok, "{check:?}");
        assert_eq!(check.remedy, None, "{check:?}");
    }
}

#[test]
fn a_host_whose_guests_have_no_ipv6_is_told_why() {
    use Status::Warn;
    for (v6, remedy) in [
        (V6::Absent, "modprobe ipv6"),
        (V6::Off, "disable_ipv6=0"),
        (V6::NoRoute, "ip -6 route add default"),
        (V6::NoForwarding, "all.forwarding=1"),
    ] {
        expect("guest IPv6", Warn, remedy, move |f| f.v6 = v6);
    }
}

#[test]
fn firecracker_matters_where_it_is_the_engine() {
    use Status::{Fail, Ok, Warn};
    let tool = |version: &str| {
        Some(Tool {
            path: "/f".into(),
            version: Some(version.into()),
        })
    };
    let chosen = |firecracker| {
        move |f: &mut Findings| {
            f.engine = EngineName::Firecracker;
            f.firecracker = firecracker;
        }
    };
    let name = "firecracker";
    expect(
        name,
        Ok,
        "chosen: engine firecracker",
        chosen(tool("1.10.1")),
    );
    expect(name, Fail, "on PATH", chosen(None));
    expect(name, Fail, "1.9.1 is too old", chosen(tool("1.9.1")));
    expect(name, Fail, "1.10 or later", chosen(tool("1.16.1")));
    expect(name, Warn, "1.9.1 is too old", |f| {
        f.firecracker = tool("1.9.1")
    });
    expect(name, Ok, "/f 1.13.0", |f| f.firecracker = tool("1.13.0"));
    assert!(judge(&good()).iter().all(|check| check.name != name));
    // The monitor is not needed then.
    let mut found = good();
    chosen(tool("1.10.1"))(&mut found);
    assert!(judge(&found).iter().all(|check| check.name != "vmm"));
}

#[test]
fn each_miss_has_its_remedy() {
    use Status::{Fail, Warn};
    expect("platform", Fail, "x86-64", |f| f.arch = "aarch64");
    expect("user", Fail, "sudo", |f| f.facts.uid = 1000);
    expect("cpu", Warn, "emulation", |f| {
        f.facts.cpu.virtualization = None
    });
    expect("kvm", Warn, "paravirtual", |f| {
        f.facts.cpu.virtualization = None
    });
    expect("kvm", Warn, "modprobe", |f| f.facts.kvm = Device::Absent);
    expect("kvm", Fail, "group kvm", |f| {
        f.engine = EngineName::Kvm;
        f.facts.kvm = Device::Denied;
    });
    expect("qemu", Warn, "apt-get install", |f| f.qemu = None);
    expect("qemu", Fail, "apt-get install", |f| {
        f.qemu = None;
        f.facts.kvm = Device::Absent;
    });
    expect("qemu", Fail, "7.2", |f| {
        f.engine = EngineName::Qemu;
        f.qemu = Some(Tool {
            path: "/q".into(),
            version: Some("5.2.0".into()),
        });
    });
    expect("vmm", Fail, "make build", |f| f.vmm = None);
    expect("agent", Fail, "FORKD_AGENT", |f| {
        f.agent = Err("no agent".into())
    });
    expect("memory", Fail, "1 GiB", |f| {
        f.facts.memory.available_bytes = 200 << 20
    });
    expect("memory", Warn, "bench", |f| {
        f.facts.memory.available_bytes = 1500 << 20
    });
    expect("disk", Fail, "2 GiB", |f| f.data.free_bytes = Some(1 << 20));
    expect("data", Fail, "--data-dir", |f| {
        f.data.problem = Some("read-only".into())
    });
    expect("image tools", Fail, "apt-get install mmdebstrap", |f| {
        f.image_tools[0].2 = false
    });
    expect("image tools", Warn, "apt-get install mmdebstrap", |f| {
        f.image_tools[0].2 = false;
        f.image_built = true;
    });
    expect("guest kernel", Fail, "linux-image-cloud", |f| {
        f.image_tools[1].2 = false
    });
    expect("cgroup v2", Warn, "unified", |f| f.facts.cgroup.v2 = None);
    expect("cgroup v2", Warn, "cgroup_no_v1", |f| {
        f.facts.cgroup.controllers = vec!["cpu".into(), "pids".into(), "io".into()];
        f.facts.cgroup.v1_controllers = vec!["memory".into()];
    });
    expect("tun", Warn, "modprobe tun", |f| {
        f.facts.tun = Device::Absent
    });
    expect("nft", Warn, "nftables", |f| f.nft = false);
    expect("open files", Warn, "LimitNOFILE", |f| {
        f.facts.open_files = (Some(1024), Some(4096))
    });
    expect("left behind", Warn, "sb-1", |f| {
        f.left_behind = vec!["sb-1".into()]
    });
    expect("daemon", Warn, "forkd serve", |f| f.daemon = Daemon::Absent);
    expect("daemon", Fail, "FORKD_TOKEN", |f| {
        f.daemon = Daemon::Refuses("no".into())
    });
}

#[test]
fn an_emulating_host_needs_no_monitor_of_ours() {
    let mut found = good();
    found.facts.cpu.virtualization = None;
    assert!(judge(&found).iter().all(|check| check.name != "vmm"));
    let needed: Vec<&str> = judge(&found)
        .iter()
        .filter(|check| check.needed)
        .map(|check| check.name)
        .collect();
    assert!(
        needed.contains(&"qemu") && !needed.contains(&"nft"),
        "{needed:?}"
    );
}
