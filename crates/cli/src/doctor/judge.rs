//! Judges what was found. Pure.

use forkd_daemon::EngineName;
use forkd_host::facts::{Device, Facts};
use forkd_slot::host::V6;

use super::{Check, Daemon, Findings, Place, Status};
use crate::human;

/// The oldest QEMU whose microvm and `x-ignore-shared` are known to work.
const QEMU_MIN: (u32, u32) = (7, 2);
/// Memory for a first parent of 512 MiB and a handful of forks.
const MEMORY_MIN: u64 = 1 << 30;
/// Below this a fan-out is cramped.
const MEMORY_GOOD: u64 = 2 << 30;
/// Disk for an image, a snapshot and what building them needs.
const DISK_MIN: u64 = 2 << 30;
/// Below this a handful of images fills the disk.
const DISK_GOOD: u64 = 5 << 30;

/// Every check, in the order in which things are needed.
pub(crate) fn judge(found: &Findings) -> Vec<Check> {
    let qemu_runs = runs_qemu(found);
    let mut checks = vec![
        platform(found),
        user(&found.facts),
        cpu(&found.facts),
        kvm(found),
        qemu(found, qemu_runs),
    ];
    match found.engine {
        EngineName::Firecracker => checks.push(firecracker(found, true)),
        _ if !qemu_runs => checks.push(vmm(found)),
        _ => {}
    }
    if found.engine != EngineName::Firecracker && found.firecracker.is_some() {
        checks.push(firecracker(found, false));
    }
    checks.extend([
        agent(found),
        memory(&found.facts),
        directory("data", &found.data, true),
        disk(&found.data),
        directory("run", &found.run, true),
    ]);
    checks.extend(image_tools(found));
    checks.extend([
        kernel(found),
        cgroup(&found.facts),
        tun(&found.facts),
        nft(found),
        guest_ipv6(found.v6),
        open_files(&found.facts),
        left_behind(found),
    ]);
    checks.extend(daemon(&found.daemon));
    checks
}

/// Whether the engine will be QEMU, as the daemon chooses.
fn runs_qemu(found: &Findings) -> bool {
    match found.engine {
        EngineName::Qemu => true,
        EngineName::Auto => {
            found.facts.cpu.virtualization.is_none() || !found.facts.kvm.is_usable()
        }
        EngineName::Kvm | EngineName::Firecracker | EngineName::Fake => false,
    }
}

fn check(name: &'static str, status: Status, detail: impl Into<String>) -> Check {
    Check {
        name,
        status,
        detail: detail.into(),
        remedy: None,
        needed: false,
    }
}

impl Check {
    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    fn needed(mut self) -> Self {
        self.needed = true;
        self
    }
}

fn platform(found: &Findings) -> Check {
    let name = found
        .facts
        .distribution
        .as_deref()
        .unwrap_or("unknown distribution");
    let detail = format!("{name}, Linux {}, {}", found.facts.kernel, found.arch);
    if found.arch == "x86_64" {
        check("platform", Status::Ok, detail).needed()
    } else {
        check("platform", Status::Fail, detail)
            .remedy("forkd runs x86-64 guests on x86-64 Linux only")
            .needed()
    }
}

fn user(facts: &Facts) -> Check {
    if facts.uid == 0 {
        return check("user", Status::Ok, "root").needed();
    }
    check(
        "user",
        Status::Fail,
        format!("user id {}, not root", facts.uid),
    )
    .remedy("run forkd as root (sudo forkd …): building images and limiting sandboxes need it")
    .needed()
}

fn cpu(facts: &Facts) -> Check {
    use forkd_host::facts::Virtualization;
    let cpu = &facts.cpu;
    let detail = format!("{} × {}", cpu.count, cpu.model);
    match cpu.virtualization {
        Some(Virtualization::Vmx) => check("cpu", Status::Ok, format!("{detail}, vmx")),
        Some(Virtualization::Svm) => check("cpu", Status::Ok, format!("{detail}, svm")),
        None => {
            let remedy = if cpu.is_guest {
                "guests run in software emulation, ten times slower; turn on nested virtualisation \
                 for this machine, or use bare metal"
            } else {
                "guests run in software emulation, ten times slower; turn on virtualisation in the \
                 firmware's settings"
            };
            check(
                "cpu",
                Status::Warn,
                format!("{detail}, neither vmx nor svm"),
            )
            .remedy(remedy)
        }
    }
}

fn kvm(found: &Findings) -> Check {
    let facts = &found.facts;
    let wanted = found.engine == EngineName::Kvm || found.engine == EngineName::Firecracker;
    let bad = if wanted { Status::Fail } else { Status::Warn };
    let made = match (&facts.kvm, facts.cpu.virtualization) {
        (Device::Usable, Some(_)) => check("kvm", Status::Ok, "/dev/kvm can be opened"),
        (Device::Usable, None) if found.engine == EngineName::Firecracker => check(
            "kvm",
            Status::Warn,
            "/dev/kvm is there although the CPU shows neither vmx nor svm: a paravirtual KVM, in \
             which stock guest kernels crawl",
        )
        .remedy("use --engine qemu here"),
        (Device::Usable, None) => check(
            "kvm",
            Status::Warn,
            "/dev/kvm is there although the CPU shows neither vmx nor svm: a paravirtual KVM, in \
             which stock guest kernels crawl",
        )
        .remedy("nothing: the qemu engine is used instead; --engine kvm is for tests here"),
        (Device::Absent, _) => check("kvm", bad, "there is no /dev/kvm").remedy(
            "load the module (modprobe kvm_intel or kvm_amd), or go on without: engine qemu",
        ),
        (Device::Denied, _) => check("kvm", bad, "/dev/kvm may not be opened by this user")
            .remedy("run as root, or join the group kvm"),
        (Device::Broken(why), _) => check("kvm", bad, format!("/dev/kvm cannot be opened: {why}"))
            .remedy("see `dmesg | grep -i kvm`"),
    };
    if wanted { made.needed() } else { made }
}

fn qemu(found: &Findings, is_engine: bool) -> Check {
    let bad = if is_engine {
        Status::Fail
    } else {
        Status::Warn
    };
    let install = "apt-get install qemu-system-x86";
    let made = match &found.qemu {
        None => check("qemu", bad, "qemu-system-x86_64 is not on PATH").remedy(install),
        Some(tool) => {
            let version = tool.version.as_deref().unwrap_or("unknown version");
            let detail = format!("{} {version}", tool.path.display());
            match tool.version.as_deref().and_then(major_minor) {
                Some(known) if known < QEMU_MIN => check("qemu", bad, detail).remedy(format!(
                    "forkd needs {}.{} or newer: {install}, on Debian 12 or newer",
                    QEMU_MIN.0, QEMU_MIN.1
                )),
                Some(_) if is_engine => {
                    check("qemu", Status::Ok, format!("{detail}, chosen: engine qemu"))
                }
                Some(_) => check("qemu", Status::Ok, detail),
                None => check("qemu", Status::Warn, detail)
                    .remedy("does `qemu-system-x86_64 --version` work?"),
            }
        }
    };
    if is_engine { made.needed() } else { made }
}

/// Never chosen unless named, so its absence matters to nobody else.
fn firecracker(found: &Findings, is_engine: bool) -> Check {
    let bad = if is_engine {
        Status::Fail
    } else {
        Status::Warn
    };
    let made = match &found.firecracker {
        None => check("firecracker", bad, "firecracker is not on PATH").remedy(
            "put the firecracker of a release of it, 1.10 or later, on PATH; or use another --engine",
        ),
        Some(tool) => {
            let version = tool.version.as_deref();
            let detail = format!(
                "{} {}",
                tool.path.display(),
                version.unwrap_or("unknown version")
            );
            match forkd_engine::firecracker::objection(&tool.path, version) {
                Some(forkd_engine::Error::Program {
                    problem, remedy, ..
                }) => {
                    let detail = format!("{}: {problem}", tool.path.display());
                    check("firecracker", bad, detail).remedy(remedy)
                }
                Some(error) => check("firecracker", bad, error.to_string()),
                None if is_engine => check(
                    "firecracker",
                    Status::Ok,
                    format!("{detail}, chosen: engine firecracker"),
                ),
                None => check("firecracker", Status::Ok, detail),
            }
        }
    };
    if is_engine { made.needed() } else { made }
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn vmm(found: &Findings) -> Check {
    match &found.vmm {
        Some(path) => {
            let detail = format!("{}, chosen: engine kvm", path.display());
            check("vmm", Status::Ok, detail).needed()
        }
        None => check(
            "vmm",
            Status::Fail,
            "no forkd-vmm beside this program or on PATH",
        )
        .remedy("run `make build` (or `make install`), or name one in FORKD_VMM")
        .needed(),
    }
}

fn agent(found: &Findings) -> Check {
    match &found.agent {
        Ok(path) => check("agent", Status::Ok, path.display().to_string()).needed(),
        Err(problem) => check("agent", Status::Fail, problem.clone())
            .remedy("run `make build` (or `make install`), or name one in FORKD_AGENT")
            .needed(),
    }
}

fn memory(facts: &Facts) -> Check {
    let memory = facts.memory;
    let free = memory.available_bytes;
    let detail = format!(
        "{} free of {}",
        human::bytes(free),
        human::bytes(memory.total_bytes)
    );
    match free {
        0..MEMORY_MIN => check("memory", Status::Fail, detail)
            .remedy("free at least 1 GiB: a parent takes 512 MiB while it boots")
            .needed(),
        MEMORY_MIN..MEMORY_GOOD => check("memory", Status::Warn, detail)
            .remedy("enough for a few sandboxes; `forkd bench` tells how many")
            .needed(),
        _ => check("memory", Status::Ok, detail).needed(),
    }
}

fn directory(name: &'static str, place: &Place, needed: bool) -> Check {
    let path = place.path.display();
    let made = match &place.problem {
        None => check(name, Status::Ok, format!("{path} can be written to")),
        Some(problem) => check(
            name,
            Status::Fail,
            format!("{path} cannot be written to: {problem}"),
        )
        .remedy("run as root, or choose another directory with --data-dir"),
    };
    Check { needed, ..made }
}

fn disk(place: &Place) -> Check {
    let Some(free) = place.free_bytes else {
        return check("disk", Status::Warn, "free space is unknown").needed();
    };
    let detail = format!("{} free for {}", human::bytes(free), place.path.display());
    match free {
        0..DISK_MIN => check("disk", Status::Fail, detail)
            .remedy("free at least 2 GiB, or choose another directory with --data-dir")
            .needed(),
        DISK_MIN..DISK_GOOD => check("disk", Status::Warn, detail)
            .remedy("enough for one or two images; `forkd image ls` shows what they take")
            .needed(),
        _ => check("disk", Status::Ok, detail).needed(),
    }
}

/// One check for all tools; they matter only until the image is there.
fn image_tools(found: &Findings) -> Vec<Check> {
    let missing: Vec<&(&str, &str, bool)> = found
        .image_tools
        .iter()
        .filter(|(_, _, present)| !present)
        .collect();
    if missing.is_empty() {
        let all: Vec<&str> = found
            .image_tools
            .iter()
            .map(|(program, ..)| *program)
            .collect();
        return vec![check("image tools", Status::Ok, all.join(", ")).needed()];
    }
    let status = if found.image_built {
        Status::Warn
    } else {
        Status::Fail
    };
    missing
        .into_iter()
        .map(|(program, package, _)| {
            check("image tools", status, format!("{program} is not on PATH"))
                .remedy(format!("apt-get install {package}"))
                .needed()
        })
        .collect()
}

fn kernel(found: &Findings) -> Check {
    let apt = found
        .image_tools
        .iter()
        .any(|(program, _, here)| *program == "apt-get" && *here);
    match (found.kernels.last(), found.image_built, apt) {
        (Some(path), _, _) => check("guest kernel", Status::Ok, path.display().to_string()),
        (None, true, _) => check("guest kernel", Status::Ok, "in the image store"),
        (None, false, true) => check(
            "guest kernel",
            Status::Ok,
            "will be downloaded with apt (linux-image-cloud-amd64)",
        ),
        (None, false, false) => check(
            "guest kernel",
            Status::Fail,
            "none installed, and no apt to download one",
        )
        .remedy("install Debian's linux-image-cloud-amd64, or name one: forkd image build --kernel")
        .needed(),
    }
}

fn cgroup(facts: &Facts) -> Check {
    let cgroup = &facts.cgroup;
    if cgroup.v2.is_none() {
        return check(
            "cgroup v2",
            Status::Warn,
            "not mounted: sandboxes run without limits",
        )
        .remedy("boot with systemd.unified_cgroup_hierarchy=1");
    }
    let missing: Vec<&str> = ["cpu", "memory", "pids", "io"]
        .into_iter()
        .filter(|wanted| !cgroup.controllers.iter().any(|has| has == wanted))
        .collect();
    if missing.is_empty() {
        return check("cgroup v2", Status::Ok, cgroup.controllers.join(", "));
    }
    let held: Vec<&str> = missing
        .iter()
        .copied()
        .filter(|name| cgroup.v1_controllers.iter().any(|v1| v1 == name))
        .collect();
    let remedy = if held.is_empty() {
        "those limits are not enforced; use a kernel that has them".to_owned()
    } else {
        format!(
            "version 1 holds {}: boot with cgroup_no_v1=all",
            held.join(", ")
        )
    };
    check(
        "cgroup v2",
        Status::Warn,
        format!("lacks {}", missing.join(", ")),
    )
    .remedy(remedy)
}

fn tun(facts: &Facts) -> Check {
    match &facts.tun {
        Device::Usable => check("tun", Status::Ok, "/dev/net/tun can be opened"),
        Device::Absent => check(
            "tun",
            Status::Warn,
            "there is no /dev/net/tun: guests have no network",
        )
        .remedy("modprobe tun; in a container, pass the device in"),
        Device::Denied => check(
            "tun",
            Status::Warn,
            "/dev/net/tun may not be opened by this user",
        )
        .remedy("run as root"),
        Device::Broken(why) => check("tun", Status::Warn, format!("/dev/net/tun: {why}"))
            .remedy("see `dmesg | grep -i tun`"),
    }
}

fn nft(found: &Findings) -> Check {
    if found.nft {
        check("nft", Status::Ok, "on PATH")
    } else {
        check(
            "nft",
            Status::Warn,
            "not on PATH: guests' traffic cannot be filtered",
        )
        .remedy("apt-get install nftables")
    }
}

/// Where the host has none, guests have version 4 alone, and lack nothing else.
fn guest_ipv6(v6: V6) -> Check {
    let without = |why: &str| {
        let detail = format!("{why}: guests have IPv4 alone");
        check("guest IPv6", Status::Warn, detail)
    };
    match v6 {
        V6::Yes => check(
            "guest IPv6",
            Status::Ok,
            "guests have it: this host has a default route of version 6",
        ),
        V6::Absent => without("this kernel has no IPv6")
            .remedy("boot without ipv6.disable=1, or load the module: modprobe ipv6"),
        V6::Off => without("IPv6 is switched off")
            .remedy("sysctl -w net.ipv6.conf.all.disable_ipv6=0, then restart the daemon"),
        V6::NoRoute => without("no default route of version 6").remedy(
            "give this host one (router advertisements, DHCPv6, or ip -6 route add default via ROUTER dev LINK), \
             then restart the daemon",
        ),
        V6::NoForwarding => without("forwarding is off and may not be switched on").remedy(
            "sysctl -w net.ipv6.conf.all.forwarding=1 on the host, or make /proc/sys writable in the container, then \
             restart the daemon",
        ),
    }
}

fn open_files(facts: &Facts) -> Check {
    let (now, most) = facts.open_files;
    let show = |limit: Option<u64>| limit.map_or_else(|| "no limit".to_owned(), |n| n.to_string());
    let detail = format!("{}, at most {}", show(now), show(most));
    if most.is_some_and(|most| most < 8192) {
        check("open files", Status::Warn, detail).remedy(
            "a fan-out of hundreds needs more: ulimit -Hn 65536, or LimitNOFILE= of the unit",
        )
    } else {
        check("open files", Status::Ok, detail)
    }
}

fn left_behind(found: &Findings) -> Check {
    if found.left_behind.is_empty() {
        return check("left behind", Status::Ok, "nothing");
    }
    let count = found.left_behind.len();
    let some: Vec<&str> = found
        .left_behind
        .iter()
        .take(3)
        .map(String::as_str)
        .collect();
    let detail = format!("{count} of VMs that are gone, such as {}", some.join(", "));
    check("left behind", Status::Warn, detail)
        .remedy("nothing: the next daemon or command that opens the node removes it (forkd images)")
}

fn daemon(daemon: &Daemon) -> Option<Check> {
    Some(match daemon {
        Daemon::NotAsked => return None,
        Daemon::Absent => check("daemon", Status::Warn, "none answers")
            .remedy("`forkd serve &` starts one; quickstart, snapshot and bench need none"),
        Daemon::Answers { version, engine } => check(
            "daemon",
            Status::Ok,
            format!("version {version}, engine {engine}"),
        ),
        Daemon::Refuses(why) => check("daemon", Status::Fail, why.clone())
            .remedy("give its token in FORKD_TOKEN, or name another with --daemon-url"),
    })
}

#[cfg(test)]
mod tests;
