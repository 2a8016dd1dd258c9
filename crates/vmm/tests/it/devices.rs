//! The devices of a Linux guest, driven through the test guest: descriptors that come with a fork, requests
//! under way across a branch, registers written at random.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use forkd_vmm::client::{Process, SnapshotFiles};
use forkd_vmm::guest::{FILL, GARBAGE, GARBAGE_PORTS, OUT, SUM};
use forkd_wire::vmm::{Child, Exit, FdSet, Reply, Request};

use crate::driver::{Driver, WRITABLE, read, read_bytes, write, write_bytes};
use crate::support::{MIB, eventually, filled, kvm, program};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Slots when a machine has one disk, a network card and sockets.
const DISK: u32 = 0;
const NET: u32 = 1;
const VSOCK: u32 = 2;
const SLOTS: u32 = 4;

/// A disk whose every sector says which it is.
fn disk(directory: &std::path::Path) -> std::path::PathBuf {
    let path = directory.join("disk");
    let sectors = (0..2048u32).flat_map(|sector| sector.to_le_bytes().repeat(128));
    std::fs::write(&path, sectors.collect::<Vec<u8>>()).unwrap();
    path
}

/// A machine with every device; none of the host's ends but the disk and, if given, the console.
fn machine(directory: &std::path::Path, console: Option<&File>) -> Process {
    let mut more = vec![
        format!("--disk={}", disk(directory).display()),
        "--mac=02:00:00:00:00:01".to_owned(),
        "--cid=3".to_owned(),
    ];
    if let Some(console) = console {
        rustix::io::fcntl_setfd(console, rustix::io::FdFlags::empty()).unwrap();
        more.push(format!("--console-fd={}", console.as_raw_fd()));
    }
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    Process::boot_test_guest(program(), MIB, &more).unwrap()
}

fn child(id: &str, fds: FdSet) -> Child {
    Child {
        id: id.to_owned(),
        user: None,
        paused: false,
        fds: FdSet::CONTROL.with(fds),
    }
}

fn fork_with(template: &mut Process, id: &str, set: FdSet, fds: &[BorrowedFd<'_>]) -> Process {
    let mut child = template.fork_with(child(id, set), fds).unwrap();
    child.alive().unwrap();
    child
}

fn print(guest: &mut Process, text: &str) {
    for byte in text.bytes() {
        guest.run(OUT, [0x3f8, u32::from(byte), 0]).unwrap();
    }
}

#[test]
fn each_fork_prints_to_the_console_it_was_given() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let said = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    let sink = File::create(path("parent")).unwrap();
    let mut parent = machine(directory.path(), Some(&sink));
    print(&mut parent, "half a ");
    let mut branch = parent.branch().unwrap();
    let names = ["one", "two"];
    for name in names {
        let sink = File::create(path(name)).unwrap();
        let fds = [sink.as_fd()];
        let mut fork = fork_with(&mut branch.template, name, FdSet::CONSOLE, &fds);
        print(&mut fork, &format!("I am {name}\n"));
    }
    // A fork that was given none prints to nobody.
    let mut silent = branch.template.fork_one().unwrap();
    print(&mut silent, "nobody hears\n");
    print(&mut parent, "line\n");
    assert_eq!(said("parent"), "half a line\n");
    for name in names {
        assert_eq!(said(name), format!("I am {name}\n"));
    }
}

#[test]
fn a_request_that_waited_at_the_branch_is_served_on_both_sides() {
    const HEADER: u32 = 0x10_0000;
    const DATA: u32 = 0x10_1000;
    const STATUS: u32 = 0x10_2000;
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut parent = machine(directory.path(), None);
    let mut driver = Driver::start(&mut parent, DISK, 1);
    // Read four sectors from the fifth; one request is served before the branch, one waits.
    for (number, sector) in [(0, 5u32), (1, 9)] {
        let (header, data, status) = (
            HEADER + 0x100 * number,
            DATA + 0x800 * number,
            STATUS + 0x100 * number,
        );
        write_bytes(
            &mut parent,
            header,
            &[[0; 8], u64::from(sector).to_le_bytes()].concat(),
        );
        write(&mut parent, status, 0xff);
        let parts = [
            (header, 16, 0),
            (data, 2048, WRITABLE),
            (status, 1, WRITABLE),
        ];
        driver.offer(&mut parent, 0, &parts);
        if number == 0 {
            driver.notify(&mut parent, 0);
            driver.wait(&mut parent, 0, 1);
        }
    }
    let mut branch = parent.branch().unwrap();
    let check = |guest: &mut Process| {
        driver.wait(guest, 0, 2);
        assert_eq!(driver.used(guest, 0), 2, "each request once");
        for (number, sector) in [(0, 5), (1, 9)] {
            assert_eq!(read(guest, STATUS + 0x100 * number) & 0xff, 0);
            for at in 0..4 {
                let found = read(guest, DATA + 0x800 * number + 512 * at);
                assert_eq!(found, sector + at);
            }
        }
    };
    // A copy takes up what waited without being told again.
    let mut copy = branch.template.fork_one().unwrap();
    check(&mut copy);
    // So does one that comes from the files.
    let files = directory.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let (files, _): (SnapshotFiles, _) = branch.template.write(&Request::Write, &files).unwrap();
    let disk = format!("--disk={}", directory.path().join("disk").display());
    let mut template = Process::template(program(), "base", &[files], &[&disk]).unwrap();
    check(&mut template.fork_one().unwrap());
    // The original has not been told yet.
    assert_eq!(driver.used(&mut parent, 0), 1);
    driver.notify(&mut parent, 0);
    check(&mut parent);
}

/// What a packet of the socket device says: operation and port of the guest.
fn packet(bytes: &[u8]) -> (u16, u32) {
    let port = u32::from_le_bytes(bytes[20..24].try_into().unwrap());
    (u16::from_le_bytes(bytes[30..32].try_into().unwrap()), port)
}

#[test]
fn each_fork_hears_the_connections_it_was_given_and_that_old_ones_are_gone() {
    const BUFFERS: u32 = 0x10_0000;
    const EVENT: u32 = 0x11_0000;
    const REQUEST: u16 = 1;
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut parent = machine(directory.path(), None);
    let mut driver = Driver::start(&mut parent, VSOCK, 3);
    for buffer in 0..4 {
        driver.offer(
            &mut parent,
            0,
            &[(BUFFERS + 0x1000 * buffer, 4096, WRITABLE)],
        );
    }
    write(&mut parent, EVENT, 0xffff_ffff);
    driver.offer(&mut parent, 2, &[(EVENT, 8, WRITABLE)]);
    let mut branch = parent.branch().unwrap();
    let mut forks = Vec::new();
    for port in [4001, 4002] {
        let path = directory.path().join(port.to_string());
        let listener = UnixListener::bind(&path).unwrap();
        let fds = [listener.as_fd()];
        let fork = fork_with(&mut branch.template, "fork", FdSet::VSOCK, &fds);
        forks.push((port, path, fork));
    }
    for (port, path, fork) in &mut forks {
        let mut stream = UnixStream::connect(path).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        driver.wait(fork, 2, 1);
        assert_eq!(read(fork, EVENT), 0, "all connections were reset");
        // New ones wait until the driver has acted on it, which it shows by giving a buffer again.
        assert_eq!(driver.used(fork, 0), 0);
        let mut driver = driver.clone();
        driver.offer(fork, 2, &[(EVENT, 8, WRITABLE)]);
        driver.notify(fork, 2);
        driver.wait(fork, 0, 1);
        let bytes = read_bytes(fork, BUFFERS, 44);
        assert_eq!(packet(&bytes), (REQUEST, *port));
    }
    // The original has neither.
    assert_eq!(driver.used(&mut parent, 0), 0);
    assert_eq!(driver.used(&mut parent, 2), 0);
}

/// A network namespace that goes away with its name.
struct Space(forkd_host::net::netns::Netns);

impl Drop for Space {
    fn drop(&mut self) {
        forkd_host::net::netns::delete(self.0.name()).unwrap();
    }
}

/// "Who has 10.42.0.1?", with the header of a network card's frame before it.
fn question() -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend(MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend([10, 42, 0, 2, 0, 0, 0, 0, 0, 0, 10, 42, 0, 1]);
    frame
}

#[test]
fn each_fork_sends_and_receives_on_the_tap_it_was_given() {
    const BUFFERS: u32 = 0x10_0000;
    const FRAME: u32 = 0x11_0000;
    if !kvm() || !rustix::process::geteuid().is_root() {
        println!("skipped: only root can make taps");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut parent = machine(directory.path(), None);
    let mut driver = Driver::start(&mut parent, NET, 2);
    for buffer in 0..8 {
        driver.offer(
            &mut parent,
            0,
            &[(BUFFERS + 0x1000 * buffer, 4096, WRITABLE)],
        );
    }
    let frame = question();
    write_bytes(&mut parent, FRAME, &frame);
    let mut branch = parent.branch().unwrap();
    for number in 0..2 {
        let name = format!("forkd-vmm-test-{}-{number}", std::process::id());
        let space = Space(forkd_host::net::netns::Netns::create(&name).unwrap());
        let tap = space.0.enter(|| {
            let tap = forkd_host::net::tap::open("forkd-tap0").unwrap();
            let mut route = forkd_host::net::route::Route::open().unwrap();
            let gateway = "10.42.0.1".parse().unwrap();
            route.add_address("forkd-tap0", gateway, 24).unwrap();
            route.set_up("forkd-tap0").unwrap();
            tap
        });
        let tap = tap.unwrap();
        let mut fork = fork_with(&mut branch.template, "fork", FdSet::TAP, &[tap.as_fd()]);
        let mut driver = driver.clone();
        driver.offer(&mut fork, 1, &[(FRAME, frame.len() as u32, 0)]);
        driver.notify(&mut fork, 1);
        driver.wait(&mut fork, 1, 1);
        // The kernel may say things of its own on a new link; one of the frames is the answer.
        let mut heard = false;
        for buffer in 0..8 {
            driver.wait(&mut fork, 0, buffer + 1);
            let answer = read_bytes(&mut fork, BUFFERS + 0x1000 * buffer, 12 + 42);
            heard = answer[24..26] == [8, 6] && answer[40..44] == [10, 42, 0, 1];
            if heard {
                assert_eq!(answer[12..18], MAC, "to this card");
                break;
            }
        }
        assert!(heard, "the gateway answers");
    }
    assert_eq!(driver.used(&mut parent, 0), 0, "the original has no wire");
}

/// A cgroup that goes away at the end.
struct Group(std::path::PathBuf);

impl Group {
    fn create() -> Option<Group> {
        let name = format!("forkd-vmm-test-{}", std::process::id());
        let path = std::path::Path::new("/sys/fs/cgroup").join(name);
        match std::fs::create_dir(&path) {
            Ok(()) if path.join("cgroup.procs").exists() => Some(Group(path)),
            made => {
                println!("skipped: no cgroup v2 to work in: {made:?}");
                _ = std::fs::remove_dir(&path);
                None
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes may need a moment to be gone.
        eventually("the group is empty", || {
            std::fs::remove_dir(&self.0).is_ok()
        });
    }
}

#[test]
fn a_child_is_born_into_its_cgroup() {
    if !kvm() {
        return;
    }
    let Some(group) = Group::create() else { return };
    let mut parent = Process::boot_test_guest(program(), MIB, &[]).unwrap();
    let mut branch = parent.branch().unwrap();
    let directory = File::open(&group.0).unwrap();
    let fds = [directory.as_fd()];
    let inside = fork_with(&mut branch.template, "inside", FdSet::CGROUP, &fds);
    let outside = branch.template.fork_one().unwrap();
    let members = std::fs::read_to_string(group.0.join("cgroup.procs")).unwrap();
    let members: Vec<&str> = members.lines().collect();
    assert_eq!(members, [inside.pid().to_string()]);
    // The descriptor of the group is not the sandbox's to keep.
    for entry in std::fs::read_dir(format!("/proc/{}/fd", inside.pid())).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap_or_default();
        assert!(!target.starts_with("/sys/fs/cgroup"), "{target:?}");
    }
    drop((inside, outside));
    let limit = group.0.join("pids.max");
    if !limit.exists() {
        println!("skipped: no pids controller: its limit is not tested");
        return;
    }
    // Room for the process, none for its vCPU's thread: an answer that names the remedy.
    std::fs::write(&limit, "1").unwrap();
    let mut failed = branch
        .template
        .fork_with(child("failed", FdSet::CGROUP), &fds)
        .unwrap();
    match failed.next().unwrap().1 {
        Reply::Failed(failure) => assert!(failure.message.contains("pids.max"), "{failure:?}"),
        other => panic!("{other:?}"),
    }
}

/// Does what it can to a machine's registers; all is well if the machine only ever ends by its own
/// wish.
fn torment(guest: &mut Process, seed: u32) {
    for round in 0..6 {
        for slot in 0..SLOTS + 2 {
            let base = 0xd000_0000 + 0x1000 * slot;
            let all = [base, 1024, seed + 97 * round + slot];
            assert_eq!(guest.run(GARBAGE, all).unwrap(), 0);
            // Between the known registers, where most of the above went.
            let few = [
                base + 0x20 + 16 * (round % 6),
                40,
                seed ^ (round << 8) ^ slot,
            ];
            assert_eq!(guest.run(GARBAGE, few).unwrap(), 0);
            for queue in 0..3 {
                write(guest, base + 0x50, queue);
            }
            read(guest, base + 4 * (round * 31 % 64));
        }
        // Not the test guest's own ports, nor those that end the machine.
        for (first, count) in [(0x70, 0x480), (0x530, 0xc0), (0x610, 0x600)] {
            assert_eq!(
                guest
                    .run(GARBAGE_PORTS, [first, count, seed + round])
                    .unwrap(),
                0
            );
        }
    }
}

#[test]
fn garbage_in_every_register_harms_nobody() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut parent = machine(directory.path(), None);
    parent.run(FILL, [4096, 50, 3]).unwrap();
    for slot in 0..SLOTS {
        Driver::start(&mut parent, slot, 1);
    }
    let mut template = parent.branch().unwrap().template;
    let mut bystander = template.fork_one().unwrap();
    for seed in [1, 2000, 0xdead_0000] {
        let mut fork = template.fork_one().unwrap();
        torment(&mut fork, seed);
        // What is left can still be frozen, and its copy runs.
        let mut branch = fork.branch().unwrap();
        branch.template.fork_one().unwrap();
        assert_eq!(fork.run(SUM, [4096, 50, 0]).unwrap(), filled(3, 50));
    }
    assert_eq!(bystander.run(SUM, [4096, 50, 0]).unwrap(), filled(3, 50));
}

#[test]
fn garbage_in_the_registers_that_end_a_machine_ends_it_or_not() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut parent = machine(directory.path(), None);
    let mut template = parent.branch().unwrap().template;
    for (seed, first, count) in [(1, 0x60, 5), (7, 0x600, 3), (9, 0x60, 5), (11, 0x600, 3)] {
        let mut fork = template.fork_one().unwrap();
        for round in 0..40 {
            let args = [first, count, seed + 1000 * round];
            // A guest that reported may have ended its machine just before: its last words are there to be read.
            let asked = fork.command(GARBAGE_PORTS, args);
            let reply = loop {
                match fork.next().unwrap().1 {
                    // It may come after the guest's first word.
                    Reply::Running(_) => {}
                    reply => break reply,
                }
            };
            match reply {
                Reply::Report(0) => asked.unwrap(),
                Reply::Exiting { exit, message } => {
                    let meant = matches!(exit, Exit::PowerOff | Exit::Reset);
                    assert!(meant, "{exit:?} {message}");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    template.fork_one().unwrap();
}

#[test]
fn a_client_that_says_nothing_does_not_hold_up_a_branch() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut parent = machine(directory.path(), None);
    let mut branch = parent.branch().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let fds = [listener.as_fd()];
    let mut fork = fork_with(&mut branch.template, "fork", FdSet::VSOCK, &fds);
    let mut silent = UnixStream::connect(&path).unwrap();
    fork.branch().unwrap().template.fork_one().unwrap();
    drop((fork, listener));
    // Its machine is gone, and with it the connection.
    silent
        .set_read_timeout(Some(forkd_vmm::client::PATIENCE))
        .unwrap();
    assert!(matches!(silent.read(&mut [0; 8]), Ok(0) | Err(_)));
}
