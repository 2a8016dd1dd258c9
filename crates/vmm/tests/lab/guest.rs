//! A Linux guest in this process: booted from the lab's kernel, its console read, its loop served.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use forkd_vmm::boot::{self, Source};
use forkd_vmm::control::Channel;
use forkd_vmm::devices::set::Plan;
use forkd_vmm::host::Host;
use forkd_vmm::machine::devices::Resources;
use forkd_vmm::machine::{Frozen, Machine, Stopwatch};
use forkd_vmm::memory::Memory;
use forkd_vmm::vcpu::{self, Threads};
use forkd_wire::vmm::{Exit, Stages};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long anything may take in the emulated node.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// The node's own root, a good disk for guests too.
const DISK: &str = "/dev/vda";

/// What the guest is made of.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) cpus: u8,
    pub(crate) memory_mib: u32,
    /// Words for the guest's init, see `guest-init.sh`.
    pub(crate) words: &'static str,
    pub(crate) kernel: PathBuf,
    /// A second, writable disk.
    pub(crate) scratch: Option<PathBuf>,
    pub(crate) tap: bool,
}

impl Spec {
    pub(crate) fn new(words: &'static str) -> Self {
        let kernel = PathBuf::from("/lab/guest/vmlinuz");
        Self {
            cpus: 1,
            memory_mib: 256,
            words,
            kernel,
            scratch: None,
            tap: false,
        }
    }

    fn plan(&self) -> Plan {
        let mut disks = vec![true];
        disks.extend(self.scratch.iter().map(|_| false));
        let mac = self.tap.then_some([0x02, 0xf0, 0x4b, 0, 0, 1]);
        Plan {
            disks,
            mac,
            cid: Some(3),
        }
    }
}

/// A running guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) machine: Arc<Machine>,
    pub(crate) threads: Threads,
    console: File,
    socket: PathBuf,
    started: Instant,
    stop: Arc<AtomicBool>,
    serving: Option<std::thread::JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

struct Parts {
    console: File,
    socket: PathBuf,
    resources: Resources,
    directory: tempfile::TempDir,
}

fn parts(spec: &Spec, tap: Option<OwnedFd>) -> Parts {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let console = OpenOptions::new()
        .create_new(true)
        .write(true)
        .open(&path)
        .unwrap();
    let socket = directory.path().join("vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut disks = vec![File::open(DISK).unwrap()];
    if let Some(path) = &spec.scratch {
        disks.push(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap(),
        );
    }
    let (control, _other) = Channel::pair().unwrap();
    let resources = Resources {
        control: Arc::new(control),
        disks,
        tap,
        vsock: Some(listener.into()),
        console: Some(console.into()),
    };
    Parts {
        console: File::open(path).unwrap(),
        socket,
        resources,
        directory,
    }
}

impl Guest {
    /// Boots.
    pub(crate) fn boot(spec: &Spec, tap: Option<OwnedFd>) -> Self {
        let started = Instant::now();
        vcpu::install_kick_handler().unwrap();
        let host = Arc::new(Host::open().unwrap());
        let memory = Arc::new(Memory::anonymous(spec.memory_mib).unwrap());
        let parts = parts(spec, tap);
        let command_line = format!(
            "console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on rdinit=/init lab.do={}",
            spec.words
        );
        let source = Source {
            kernel: &mut File::open(&spec.kernel).unwrap(),
            initramfs: Some(&mut File::open("/lab/guest/initramfs").unwrap()),
            command_line: &command_line,
        };
        let Parts {
            console,
            socket,
            resources,
            directory,
        } = parts;
        let machine =
            boot::machine::machine(&host, &memory, source, spec.cpus, spec.plan(), resources)
                .unwrap();
        Self::run(machine, console, socket, directory, started)
    }

    /// Makes a copy in this process, over a copy of the memory.
    pub(crate) fn copy(&self, spec: &Spec, tap: Option<OwnedFd>) -> Self {
        let started = Instant::now();
        let frozen: Frozen = self.machine.save().unwrap();
        let from = self.machine.memory();
        let memory = Memory::anonymous(spec.memory_mib).unwrap();
        copy_memory(from, &memory);
        let host = self.machine.host().clone();
        let Parts {
            console,
            socket,
            resources,
            directory,
        } = parts(spec, tap);
        let mut watch = Stopwatch::from(started);
        let mut stages = Stages::default();
        let machine = Machine::restore(
            &host,
            &Arc::new(memory),
            &frozen,
            resources,
            &mut watch,
            &mut stages,
        )
        .unwrap();
        Self::run(machine, console, socket, directory, started)
    }

    fn run(
        machine: Machine,
        console: File,
        socket: PathBuf,
        directory: tempfile::TempDir,
        started: Instant,
    ) -> Self {
        let threads = machine.start(false, || {}).unwrap();
        let machine = Arc::new(machine);
        let stop = Arc::new(AtomicBool::new(false));
        let (served, stopped) = (machine.clone(), stop.clone());
        let serving = std::thread::spawn(move || {
            let set = served.devices().set().unwrap();
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: 20_000_000,
            };
            while !stopped.load(Ordering::Relaxed) {
                let fd = set.as_fd();
                let mut fds = [PollFd::new(&fd, PollFlags::IN)];
                if poll(&mut fds, Some(&tick)).is_ok_and(|ready| ready > 0) {
                    set.serve();
                }
            }
        });
        Self {
            machine,
            threads,
            console,
            socket,
            started,
            stop,
            serving: Some(serving),
            _directory: directory,
        }
    }

    /// Everything the guest printed.
    pub(crate) fn printed(&mut self) -> String {
        let mut text = Vec::new();
        self.console.seek(SeekFrom::Start(0)).unwrap();
        self.console.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits for a line that begins with `lab: WORD` and returns what follows.
    pub(crate) fn wait(&mut self, word: &str) -> String {
        let start = format!("lab: {word}");
        let deadline = Instant::now() + PATIENCE;
        let mut tell = Instant::now() + PATIENCE / 4;
        loop {
            let text = self.printed();
            if Instant::now() > tell {
                tell = Instant::now() + PATIENCE / 4;
                let tail: Vec<&str> = text.lines().rev().take(8).collect();
                eprintln!("still no `{start}`; the guest's last lines, backwards: {tail:#?}");
            }
            let found = text
                .lines()
                .find_map(|line| line.trim_end().strip_prefix(&start));
            if let Some(rest) = found {
                return rest.trim().to_owned();
            }
            let ended = self.machine.exit().reason();
            assert!(
                Instant::now() < deadline && (ended.is_none() || word == "bye"),
                "no `{start}` from the guest, which ended with {ended:?}; it printed:\n{text}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Milliseconds since it was made.
    pub(crate) fn elapsed_ms(&self) -> u128 {
        self.started.elapsed().as_millis()
    }

    /// Waits for the end and says how it came.
    pub(crate) fn ended(&self) -> Exit {
        let deadline = Instant::now() + PATIENCE / 4;
        loop {
            if let Some((exit, _)) = self.machine.exit().reason() {
                return exit;
            }
            if Instant::now() > deadline {
                panic!(
                    "the guest did not end; its cpus stand at {:x?}",
                    self.instructions()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Where each vCPU is, for failures.
    fn instructions(&self) -> Vec<(u64, u64)> {
        self.threads.park();
        let at = |vcpu: &Arc<vcpu::Vcpu>| {
            vcpu.with_fd(|fd| fd.get_regs())
                .map_or((0, 0), |regs| (regs.rip, regs.rflags))
        };
        self.threads.vcpus().iter().map(at).collect()
    }

    /// Opens a stream to a port of the guest.
    pub(crate) fn dial(&self, port: u32) -> std::io::Result<UnixStream> {
        dial(&self.socket, port)
    }
}

/// Opens a stream to a port of the guest behind `socket`.
pub(crate) fn dial(socket: &Path, port: u32) -> std::io::Result<UnixStream> {
    use std::io::{BufRead as _, BufReader, Write as _};
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {port}")?;
    // Byte by byte: what follows the answer belongs to the stream.
    let mut answer = String::new();
    BufReader::with_capacity(1, &stream).read_line(&mut answer)?;
    if answer.starts_with("OK ") {
        Ok(stream)
    } else {
        Err(std::io::Error::other(format!("refused: {answer:?}")))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(serving) = self.serving.take() {
            serving.join().ok();
        }
        if std::thread::panicking() {
            let text = self.printed();
            eprintln!("the guest printed:\n{text}");
        }
        // The threads end with the process; parked they take no time.
        self.threads.park();
    }
}

fn copy_memory(from: &Memory, to: &Memory) {
    use vm_memory::{Bytes as _, GuestAddress};
    let mut page = vec![0; 1 << 20];
    for (address, _, len) in from.regions() {
        for at in (address..address + len).step_by(page.len()) {
            from.guest()
                .read_slice(&mut page, GuestAddress(at))
                .unwrap();
            if page.iter().any(|byte| *byte != 0) {
                to.guest().write_slice(&page, GuestAddress(at)).unwrap();
            }
        }
    }
}
