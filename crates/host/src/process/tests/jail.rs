//! Hostile code in a machine monitor's place: this very test program, started once more in a jail, does there
//! what an attacker would. What it must know, an attacker would guess.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SealFlags};

use super::super::root::{Contents, Root, with_libraries};
use super::super::{Confinement, Exit, Process, Spawn, Stdio, User};
use super::{PATIENCE, sys};

/// Users that nobody else on a test machine has.
const ATTACKER: u32 = 4_000_001;
const NEIGHBOUR: u32 = 4_000_002;
const CALLER: u32 = 4_000_003;
const NAMESPACES: [&str; 5] = ["mnt", "net", "ipc", "uts", "pid"];

fn confinement(user: u32) -> Confinement {
    let this = std::env::current_exe().unwrap();
    let root = Root::make(&Contents {
        files: with_libraries(&this).unwrap(),
        devices: vec!["/dev/zero".into()],
        ..Contents::default()
    });
    Confinement {
        root: Some(root.unwrap()),
        given_network: false,
        own_sockets: false,
        user: Some(User {
            id: user,
            groups: vec![],
        }),
        file_bytes: 1 << 20,
        open_files: 64,
        threads: 16,
    }
}

/// Runs one of the attacks below in a jail. Answers how it ended, and its words.
fn run(attack: &str, facts: &[String], inherit: Vec<OwnedFd>, user: u32) -> (Exit, String) {
    let (process, mut reader) = start(attack, facts, inherit, user);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    (process.wait_for(PATIENCE).unwrap().expect("ended"), text)
}

fn start(
    attack: &str,
    facts: &[String],
    inherit: Vec<OwnedFd>,
    user: u32,
) -> (Process, io::PipeReader) {
    start_in(confinement(user), None, attack, facts, inherit)
}

pub(super) fn start_in(
    confine: Confinement,
    netns: Option<OwnedFd>,
    attack: &str,
    facts: &[String],
    inherit: Vec<OwnedFd>,
) -> (Process, io::PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    let name = match attack.contains("::") {
        true => format!("process::tests::{attack}"),
        false => format!("process::tests::jail::{attack}"),
    };
    let mut args = vec![
        "--exact",
        "--ignored",
        "--nocapture",
        "--test-threads=1",
        &name,
    ];
    // The test program takes them for names of tests, of which there are none.
    args.extend(facts.iter().map(String::as_str));
    let spawn = Spawn {
        stdout: Stdio::Fd(writer.try_clone().unwrap().into()),
        stderr: Stdio::Fd(writer.into()),
        inherit,
        die_with_parent: true,
        confine: Some(confine),
        netns,
        ..Spawn::new(
            std::env::current_exe().unwrap(),
            args.into_iter().map(Into::into).collect(),
        )
    };
    (Process::spawn(spawn).unwrap(), reader)
}

pub(super) fn fact(name: &str, value: impl std::fmt::Display) -> String {
    format!("@{name}={value}")
}

/// In the jail: what the attacker was told. `None`: this is no jail, and nothing must be tried.
pub(super) fn told() -> Option<BTreeMap<String, String>> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let confined = status.lines().any(|line| line == "Seccomp:\t2");
    let pair = |arg: String| {
        let (name, value) = arg.strip_prefix('@')?.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let facts: BTreeMap<_, _> = std::env::args().filter_map(pair).collect();
    (confined && !facts.is_empty()).then_some(facts)
}

pub(super) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can put a process into a jail");
    }
    root
}

fn sealed(content: &[u8]) -> File {
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let mut file: File = rustix::fs::memfd_create("template", flags).unwrap().into();
    file.write_all(content).unwrap();
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

pub(super) fn namespace(kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap()
}

#[test]
fn an_attacker_in_a_jail_finds_nothing_of_the_host() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(dir.path(), mode(0o777)).unwrap();
    fs::set_permissions(&secret, mode(0o666)).unwrap();
    let path_socket = dir.path().join("daemon.sock");
    let _path = UnixListener::bind(&path_socket).unwrap();
    let abstract_name = format!("forkd-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let (neighbour, mut said) = start("sits_there", &[fact("sit", 1)], vec![], NEIGHBOUR);
    said.read_exact(&mut [0; 1]).unwrap();
    let content = vec![7; 8192];
    let template = sealed(&content);
    let given: OwnedFd = File::open(format!("/proc/self/fd/{}", template.as_raw_fd()))
        .unwrap()
        .into();
    let mut facts = vec![
        fact("secret", secret.display()),
        fact("socket", path_socket.display()),
        fact("abstract", &abstract_name),
        fact("port", tcp.local_addr().unwrap().port()),
        fact("host", std::process::id()),
        fact("neighbour", neighbour.identity().pid),
        fact("template", given.as_raw_fd()),
        fact("user", ATTACKER),
    ];
    facts.extend(NAMESPACES.map(|kind| fact(kind, namespace(kind).display())));
    let (exit, text) = run("looks_around", &facts, vec![given], ATTACKER);
    assert_eq!(exit, Exit::Code(0), "{text}");
    assert!(text.contains("nothing found"), "{text}");
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(
        fs::read(format!("/proc/self/fd/{}", template.as_raw_fd())).unwrap(),
        content
    );
    assert!(neighbour.try_wait().unwrap().is_none(), "neighbour died");
    neighbour.kill().unwrap();
    neighbour.wait_for(PATIENCE).unwrap().unwrap();
}

#[test]
fn a_hostile_system_call_ends_only_its_process() {
    if !is_root() {
        return;
    }
    let (neighbour, mut said) = start("sits_there", &[fact("sit", 1)], vec![], CALLER);
    said.read_exact(&mut [0; 1]).unwrap();
    let pid = neighbour.identity().pid.into();
    let calls = [
        (libc::SYS_mount, 0),
        (libc::SYS_umount2, 0),
        (libc::SYS_setuid, 0),
        (libc::SYS_setgroups, 0),
        (libc::SYS_unshare, libc::CLONE_NEWUSER as u64),
        (libc::SYS_setns, 3),
        (libc::SYS_chroot, 0),
        (libc::SYS_fork, 0),
        (libc::SYS_clone, libc::SIGCHLD as u64),
        (libc::SYS_ptrace, libc::PTRACE_ATTACH as u64),
        (libc::SYS_process_vm_readv, pid),
        (libc::SYS_bpf, 0),
        (libc::SYS_init_module, 0),
        (libc::SYS_kexec_load, 0),
        (libc::SYS_keyctl, 0),
        (libc::SYS_perf_event_open, 0),
        (libc::SYS_reboot, 0),
    ];
    for (number, argument) in calls {
        let facts = [fact("call", number), fact("argument", argument)];
        let (exit, text) = run("makes_a_call", &facts, vec![], CALLER);
        assert_eq!(exit, Exit::Signal(libc::SIGSYS), "call {number}: {text}");
    }
    assert!(neighbour.try_wait().unwrap().is_none(), "neighbour died");
    neighbour.kill().unwrap();
    neighbour.wait_for(PATIENCE).unwrap().unwrap();
}

#[test]
#[ignore = "is run by the others, in a jail"]
fn sits_there() {
    if told().is_none() {
        return;
    }
    loop {
        println!("here");
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

#[test]
#[ignore = "is run by the others, in a jail"]
fn makes_a_call() {
    let Some(told) = told() else { return };
    let number = |name: &str| told[name].parse::<u64>().unwrap();
    let result = sys::call(number("call") as i64, [number("argument"), 0, 0]);
    panic!("lived on with {result:?}");
}

#[test]
#[ignore = "is run by the others, in a jail"]
fn looks_around() {
    let Some(told) = told() else { return };
    let user: u32 = told["user"].parse().unwrap();
    reads_and_writes_nothing(Path::new(&told["secret"]));
    connects_to_nothing(&told);
    sees_and_signals_nobody(&told);
    has_no_privilege(user);
    changes_no_template(told["template"].parse().unwrap());
    for kind in NAMESPACES {
        assert_ne!(namespace(kind).display().to_string(), told[kind]);
    }
    assert_eq!(std::env::vars_os().count(), 0);
    // What a monitor must be able to do.
    let mut zero = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    zero.read_exact(&mut [1; 8]).unwrap();
    assert_eq!(fs::read_dir("/dev").unwrap().count(), 1);
    let sleep = || std::thread::sleep(std::time::Duration::from_secs(1));
    let begin = |_| std::thread::Builder::new().spawn(sleep);
    let refused = (0..20).map(begin).any(|thread| thread.is_err());
    assert!(refused, "threads are not limited");
    std::thread::sleep(std::time::Duration::from_secs(2));
    let thread = std::thread::spawn(|| fs::read(std::env::current_exe().unwrap()).unwrap().len());
    assert!(thread.join().unwrap() > 0);
    println!("nothing found");
}

fn reads_and_writes_nothing(secret: &Path) {
    for path in [secret, Path::new("/etc/shadow"), Path::new("/run")] {
        let error = fs::metadata(path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{path:?}");
    }
    let mut found = vec![PathBuf::from("/")];
    let mut files = 0;
    while let Some(dir) = found.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && entry.path() != Path::new("/proc") {
                found.push(entry.path());
            } else if kind.is_file() {
                files += 1;
                let open = File::options().write(true).open(entry.path());
                open.expect_err("a file of the root can be written");
            }
        }
        File::create(dir.join("x")).expect_err("the root can be written");
    }
    // This program and its libraries, no more.
    assert!((2..30).contains(&files), "{files} files");
}

fn connects_to_nothing(told: &BTreeMap<String, String>) {
    let port = told["port"].parse().unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap_err();
    UnixStream::connect(&told["socket"]).unwrap_err();
    let address = SocketAddr::from_abstract_name(&told["abstract"]).unwrap();
    UnixStream::connect_addr(&address).unwrap_err();
}

fn sees_and_signals_nobody(told: &BTreeMap<String, String>) {
    for name in ["host", "neighbour"] {
        let pid: i32 = told[name].parse().unwrap();
        let raw = rustix::process::Pid::from_raw(pid).unwrap();
        let error = rustix::process::test_kill_process(raw).unwrap_err();
        assert_eq!(error, rustix::io::Errno::SRCH);
        for file in ["mem", "environ", "fd", "root", "maps"] {
            fs::metadata(format!("/proc/{pid}/{file}")).unwrap_err();
        }
    }
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter(|e| e.file_name().to_string_lossy().parse::<u32>().is_ok());
    assert_eq!(pids.count(), 1, "others are seen");
    assert_eq!(std::process::id(), 1);
    fs::metadata("/proc/sys").unwrap_err();
}

fn has_no_privilege(user: u32) {
    assert_eq!(rustix::process::getuid().as_raw(), user);
    assert_eq!(rustix::process::getegid().as_raw(), user);
    assert_eq!(rustix::process::getgroups().unwrap(), []);
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(value(set), "0000000000000000", "{set}");
    }
    assert_eq!(value("NoNewPrivs:"), "1");
    assert_eq!(value("CoreDumping:"), "0");
}

fn changes_no_template(number: i32) {
    let path = format!("/proc/self/fd/{number}");
    // As QEMU opens its memory.
    let mut file = File::options().read(true).write(true).open(path).unwrap();
    let refused = rustix::io::Errno::PERM.raw_os_error();
    let errors = [
        file.write_all(b"hostile").unwrap_err(),
        file.set_len(1).unwrap_err(),
        file.set_len(1 << 20).unwrap_err(),
        sys::map_shared(&file).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.raw_os_error(), Some(refused), "{error}");
    }
}
