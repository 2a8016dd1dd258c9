//! Hostile code in the monitor's place: this very test program, started once more, confines itself as a
//! sandbox does, as the user of another sandbox, and does to that what an attacker would. What it must
//! know, an attacker would guess.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use forkd_vmm::guest::READ;
use forkd_vmm::{jail, seccomp};
use forkd_wire::vmm::{Child, FdSet};

use crate::support::World;
use crate::sys;

/// A user that nobody else on a test machine has.
const USER: u32 = 4_000_011;

/// How far the attacker is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Confined {
    /// A user and nothing else: shows which attacks would work.
    User,
    /// As a sandbox's main thread.
    Main,
    /// As a vCPU's thread.
    Vcpu,
}

/// Attacks on another process that the kernel allows among processes of one user.
const OF_ONE_USER: [&str; 6] = [
    "tgkill",
    "kill",
    "prlimit64",
    "sched_setaffinity",
    "setpriority",
    "pidfd_open",
];

/// Attacks that it does not allow, because a sandbox cannot be traced; the filter is the second wall.
const REFUSED: [&str; 8] = [
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "openat /proc/PID/mem",
    "openat /proc/PID/fd/0",
    "get_robust_list",
    "kcmp",
    "prctl PR_SCHED_CORE",
];

/// Attacks by way of descriptors and of the process's own settings.
const INDIRECT: [&str; 6] = [
    "fcntl F_SETOWN",
    "fcntl F_SETSIG",
    "fcntl F_SETFL O_DIRECT",
    "setrlimit",
    "prctl PR_SET_PTRACER",
    "unshare",
];

fn attack(name: &str, victim: u64) -> std::io::Result<i64> {
    let all_cpus = u64::MAX;
    let path =
        format!("{}\0", name.trim_start_matches("openat ")).replace("PID", &victim.to_string());
    let limit = [64_u64, 64];
    let (cpus, path, limit) = (
        &raw const all_cpus as u64,
        path.as_ptr() as u64,
        limit.as_ptr() as u64,
    );
    let (number, arguments) = match name.split(' ').next().unwrap() {
        "tgkill" => (libc::SYS_tgkill, [victim, victim, 0, 0, 0]),
        "kill" => (libc::SYS_kill, [victim, 0, 0, 0, 0]),
        "prlimit64" => (libc::SYS_prlimit64, [victim, 7, limit, 0, 0]),
        "sched_setaffinity" => (libc::SYS_sched_setaffinity, [victim, 8, cpus, 0, 0]),
        "setpriority" => (libc::SYS_setpriority, [0, victim, 19, 0, 0]),
        "pidfd_open" => (libc::SYS_pidfd_open, [victim, 0, 0, 0, 0]),
        "ptrace" => (libc::SYS_ptrace, [16, victim, 0, 0, 0]),
        "process_vm_readv" => (libc::SYS_process_vm_readv, [victim, 0, 0, 0, 0]),
        "process_vm_writev" => (libc::SYS_process_vm_writev, [victim, 0, 0, 0, 0]),
        "openat" => (libc::SYS_openat, [0, path, libc::O_RDWR as u64, 0, 0]),
        "get_robust_list" => (libc::SYS_get_robust_list, [victim, 0, 0, 0, 0]),
        "kcmp" => (libc::SYS_kcmp, [victim, victim, 2, 0, 0]),
        "fcntl" => return descriptor(name, victim),
        "setrlimit" => (libc::SYS_setrlimit, [7, limit, 0, 0, 0]),
        "unshare" => (libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0]),
        "prctl" if name.ends_with("PTRACER") => (libc::SYS_prctl, [0x5961_6d61, victim, 0, 0, 0]),
        "prctl" => (libc::SYS_prctl, [62, 1, victim, 0, 0]),
        other => panic!("no such attack: {other}"),
    };
    sys::call(number, arguments)
}

fn descriptor(name: &str, victim: u64) -> std::io::Result<i64> {
    let (command, value) = match name {
        "fcntl F_SETOWN" => (libc::F_SETOWN, victim),
        "fcntl F_SETSIG" => (10, libc::SIGKILL as u64),
        _ => (libc::F_SETFL, libc::O_DIRECT as u64),
    };
    sys::call(libc::SYS_fcntl, [1, command as u64, value, 0, 0])
}

/// Has the attack done. What it says, and how it ended.
fn run(name: &str, confined: Confined, victim: u32) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .arg("attack::is_hostile")
        // The test program takes them for names of tests, of which there are none.
        .args([
            format!("@attack={name}"),
            format!("@confined={confined:?}"),
            format!("@victim={victim}"),
        ])
        .output()
        .unwrap()
}

fn told() -> BTreeMap<String, String> {
    let pair = |arg: String| {
        let (name, value) = arg.strip_prefix('@')?.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    std::env::args().filter_map(pair).collect()
}

#[test]
#[ignore = "is run by the others, as an attacker"]
fn is_hostile() {
    let told = told();
    let Some(victim) = told.get("victim") else {
        return;
    };
    let victim: u64 = victim.parse().unwrap();
    // In the order of a template and its fork.
    if told["confined"] != "User" {
        jail::enter_empty_root().unwrap();
        seccomp::confine_main().unwrap();
    }
    jail::become_user(USER, USER).unwrap();
    if told["confined"] == "Vcpu" {
        seccomp::confine_vcpu();
    }
    let done = match told["attack"].as_str() {
        "timer_create" => sys::timer_for(victim as i32).map(|()| 0),
        name => attack(name, victim),
    };
    println!("lived on: {done:?}");
}

#[test]
fn nothing_reaches_a_sandbox_of_the_same_user() {
    let Some(mut world) = World::new() else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can give a sandbox a user");
        return;
    }
    let (mut template, _) = world.template();
    let child = Child {
        id: "first".to_owned(),
        user: Some((USER, USER)),
        paused: false,
        fds: FdSet::CONTROL,
    };
    let mut sandbox = template.fork_with(child, &[]).unwrap();
    sandbox.alive().unwrap();
    let mut branch = sandbox.branch().unwrap();
    // Not written yet, so that its fork is of the same user.
    let mut victim = branch.template.fork_one().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", victim.pid())).unwrap();
    let user = format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}");
    assert!(status.contains(&user), "{status}");

    for name in OF_ONE_USER {
        let text = text(&run(name, Confined::User, victim.pid()));
        assert!(
            text.contains("lived on: Ok"),
            "not an attack: {name}: {text}"
        );
    }
    for name in REFUSED {
        let text = text(&run(name, Confined::User, victim.pid()));
        assert!(text.contains("lived on: Err"), "{name}: {text}");
    }
    for confined in [Confined::Main, Confined::Vcpu] {
        for name in [&OF_ONE_USER[..], &REFUSED, &INDIRECT].concat() {
            let output = run(name, confined, victim.pid());
            let signal = output.status.signal();
            assert_eq!(signal, Some(libc::SIGSYS), "{name}: {}", text(&output));
        }
    }
    // The one way to signal a thread that is left knows those of its own process only.
    let output = text(&run("timer_create", Confined::Main, victim.pid()));
    assert!(output.contains("lived on: Err(Os { code: 22"), "{output}");
    let output = run("timer_create", Confined::Vcpu, victim.pid());
    assert_eq!(output.status.signal(), Some(libc::SIGSYS));

    // Unharmed, all of them.
    assert_eq!(victim.run(READ, [0x2000, 0, 0]).unwrap(), 0);
    assert_eq!(sandbox.run(READ, [0x2000, 0, 0]).unwrap(), 0);
    branch.template.fork_one().unwrap();
    victim.branch().unwrap().template.fork_one().unwrap();
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}
