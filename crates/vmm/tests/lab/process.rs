//! The program itself with a Linux guest: booted, branched while it runs, forked, written, loaded.
//! Jail and system call filters are on, as in production.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use forkd_vmm::client::Process;
use forkd_vmm::control::Channel;
use forkd_wire::vmm::{Child, FdSet, Reply, Request};
use rustix::process::{Signal, WaitId, WaitIdOptions};

use crate::guest::{PATIENCE, dial};
use crate::node::lab;

const PROGRAM: &str = "/lab/bin/forkd-vmm";
const DISK: &str = "/dev/vda";
const PORT: u32 = 49983;

/// The host's ends of one machine: where it listens and what it prints.
struct Ends {
    socket: PathBuf,
    listener: UnixListener,
    console: PathBuf,
    sink: File,
}

impl Ends {
    fn new(directory: &Path, name: &str) -> Self {
        let socket = directory.join(format!("{name}.sock"));
        let console = directory.join(format!("{name}.log"));
        let listener = UnixListener::bind(&socket).unwrap();
        let sink = File::create(&console).unwrap();
        Self {
            socket,
            listener,
            console,
            sink,
        }
    }

    /// The highest number that the guest has printed after `word`; 0 for none.
    fn number(&self, word: &str) -> u32 {
        let text = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let start = format!("lab: {word} ");
        let numbers = text.lines().filter_map(|line| {
            let (_, rest) = line.split_once(&start)?;
            rest.trim_end().parse().ok()
        });
        numbers.max().unwrap_or(0)
    }

    /// Waits until the guest has printed a number above `least` after `word`.
    fn wait_beyond(&self, word: &str, least: u32) {
        let deadline = Instant::now() + PATIENCE;
        while self.number(word) <= least {
            assert!(Instant::now() < deadline, "{word} stays at {least}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Nothing of what the guest watches went wrong.
    fn check(&self) {
        let text = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        for bad in [
            "disk WRONG",
            "high WRONG",
            "ticks BACK",
            "I/O error",
            "Oops",
            "soft lockup",
        ] {
            assert!(!text.contains(bad), "{bad}; the guest printed:\n{text}");
        }
    }

    fn wait(&self, line: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = std::fs::read(&self.console).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            if text.contains(line) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "no {line:?}; the guest printed:\n{text}"
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    fn stream(&self) -> UnixStream {
        dial(&self.socket, PORT).unwrap()
    }
}

fn round_trip(stream: &mut UnixStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, text);
}

fn boot(ends: &Ends, words: &str, cpus: u8, memory_mib: u32) -> Process {
    for fd in [ends.listener.as_fd(), ends.sink.as_fd()] {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
    }
    let (vsock, console) = (ends.listener.as_raw_fd(), ends.sink.as_raw_fd());
    let arguments: Vec<String> = [
        "boot",
        "--memory",
        &memory_mib.to_string(),
        "--vcpus",
        &cpus.to_string(),
        "--kernel",
        "/lab/guest/vmlinuz",
        "--initramfs",
        "/lab/guest/initramfs",
        "--disk",
        DISK,
        "--cid",
        "3",
        "--vsock-fd",
        &vsock.to_string(),
        "--console-fd",
        &console.to_string(),
        "--cmdline",
        &format!("console=ttyS0 panic=-1 mitigations=off rdinit=/init lab.do={words}"),
    ]
    .map(str::to_owned)
    .to_vec();
    Process::start(Path::new(PROGRAM), &arguments).unwrap()
}

/// How much memory of its own a process really has.
fn resident_kib(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|kib| kib.parse().ok()).unwrap()
}

/// A fork, ended and reaped when it goes out of scope.
struct Fork {
    pidfd: OwnedFd,
    control: Channel,
    ends: Ends,
    asked: Instant,
}

impl Drop for Fork {
    fn drop(&mut self) {
        rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
        rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED).ok();
    }
}

fn fork(template: &mut Process, directory: &Path, name: &str) -> Fork {
    let ends = Ends::new(directory, name);
    let (ours, theirs) = Channel::pair().unwrap();
    let fds = FdSet::CONTROL.with(FdSet::VSOCK).with(FdSet::CONSOLE);
    let child = Child {
        id: name.to_owned(),
        user: None,
        paused: false,
        fds,
    };
    let asked = Instant::now();
    let request = Request::Fork {
        children: vec![child],
    };
    let seq = template
        .send(
            &request,
            &[theirs.as_fd(), ends.listener.as_fd(), ends.sink.as_fd()],
        )
        .unwrap();
    let (reply, mut pidfds) = template.answer(seq).unwrap();
    assert!(
        matches!(&reply, Reply::Forked(children) if children[0].is_ok()),
        "{reply:?}"
    );
    Fork {
        pidfd: pidfds.remove(0),
        control: ours,
        ends,
        asked,
    }
}

impl Fork {
    /// Waits until the machine runs and its guest answers.
    fn check(&self, what: &str) {
        let reply = self.control.next_reply().unwrap();
        let reply = reply
            .map(|message| format!("{message:?}"))
            .unwrap_or_default();
        assert!(reply.contains("Running"), "{reply}");
        let running = self.asked.elapsed().as_millis();
        let mut stream = self.ends.stream();
        let connected = self.asked.elapsed().as_millis();
        round_trip(&mut stream, what.as_bytes());
        println!(
            "figure {what}_running_ms {running}\nfigure {what}_connected_ms {connected}\nfigure {what}_answered_ms {}",
            self.asked.elapsed().as_millis()
        );
        self.ends.wait("lab: count");
        let mut large = vec![5; 200_000];
        large[199_999] = 6;
        let mut writer = stream.try_clone().unwrap();
        let sent = large.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut back = vec![0; large.len()];
        stream.read_exact(&mut back).unwrap();
        writing.join().unwrap();
        assert!(back == large);
    }
}

#[test]
fn a_running_guest_is_branched_forked_written_and_loaded() {
    let Some(_) = lab() else { return };
    let directory = tempfile::tempdir().unwrap();
    let parent_ends = Ends::new(directory.path(), "parent");
    let mut parent = boot(&parent_ends, "root,vsock,count", 1, 256);
    parent_ends.wait("lab: vsock listening");
    parent_ends.wait("lab: count 3");
    let mut old = parent_ends.stream();
    round_trip(&mut old, b"before");

    let mut branch = parent.branch().unwrap();
    println!(
        "figure branch_pause_us {} stages {:?}",
        branch.pause_us, branch.stages_us
    );
    round_trip(&mut old, b"the original's stream is whole");
    let forks: Vec<Fork> = (0..3)
        .map(|number| {
            fork(
                &mut branch.template,
                directory.path(),
                &format!("fork{number}"),
            )
        })
        .collect();
    for fork in &forks {
        fork.check("fork");
    }
    drop(forks);

    let files = directory.path().join("snapshot");
    std::fs::create_dir(&files).unwrap();
    let (files, written) = branch.template.write(&Request::Write, &files).unwrap();
    println!("figure written {written:?}");
    drop(branch);
    drop(parent);
    let more = ["--disk", DISK];
    let mut template = Process::template(Path::new(PROGRAM), "base", &[files], &more).unwrap();
    fork(&mut template, directory.path(), "loaded").check("loaded_fork");
}

#[test]
fn a_busy_guest_with_two_cpus_is_branched_while_its_disk_works_and_its_clock_goes_on() {
    let Some(_) = lab() else { return };
    let directory = tempfile::tempdir().unwrap();
    let parent_ends = Ends::new(directory.path(), "parent");
    let mut parent = boot(&parent_ends, "root,disk,ticks", 2, 256);
    for word in ["disk", "ticks"] {
        parent_ends.wait_beyond(word, 2);
    }
    for round in 0..2 {
        let (disk, ticks) = (parent_ends.number("disk"), parent_ends.number("ticks"));
        let mut branch = parent.branch().unwrap();
        println!(
            "figure branch_two_cpus_pause_us {} stages {:?}",
            branch.pause_us, branch.stages_us
        );
        let fork = fork(
            &mut branch.template,
            directory.path(),
            &format!("busy{round}"),
        );
        // A copy goes on where the original stood: no request of its disk was lost, no time went back.
        fork.ends.wait_beyond("disk", disk + 1);
        fork.ends.wait_beyond("ticks", ticks + 2);
        fork.ends.check();
        drop(fork);
        parent_ends.wait_beyond("disk", disk + 1);
    }
    parent_ends.wait_beyond("ticks", parent_ends.number("ticks") + 2);
    parent_ends.check();
}

/// Beyond the memory of most nodes that run this, so most of it must never become real.
#[test]
fn a_guest_with_memory_above_4_gib_uses_it_and_its_copies_do() {
    let Some(_) = lab() else { return };
    let directory = tempfile::tempdir().unwrap();
    let parent_ends = Ends::new(directory.path(), "parent");
    let mut parent = boot(&parent_ends, "root,memory,high", 1, 5120);
    parent_ends.wait_beyond("memory", 4_800_000);
    parent_ends.wait_beyond("above", 0);
    assert_eq!(parent_ends.number("above"), 256, "pages above 4 GiB");
    parent_ends.wait_beyond("high", 1);
    let resident = resident_kib(&parent);
    println!("figure resident_of_5_gib_kib {resident}");
    assert!(resident < 1 << 20, "{resident} KiB of 5 GiB are real");

    let before = parent_ends.number("high");
    let mut branch = parent.branch().unwrap();
    println!("figure branch_5_gib_pause_us {}", branch.pause_us);
    let one = fork(&mut branch.template, directory.path(), "one");
    let two = fork(&mut branch.template, directory.path(), "two");
    // Each counts on from the same memory, and finds there what it wrote itself.
    for ends in [&one.ends, &two.ends, &parent_ends] {
        ends.wait_beyond("high", before + 2);
        ends.check();
    }
}
