//! The command line. Everything is parsed here; nothing is decided.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use forkd_vmm::bench;
use forkd_vmm::start::{Error, Guest, LinuxGuest, Peripherals, Process, Size, Snapshot};

/// The machine monitor of forkd. People use `forkd`; this program is started by its daemon.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  forkd-vmm check\n  forkd-vmm bench --json\n\nThe other commands talk binary messages on an inherited SOCK_SEQPACKET socket.\nExit codes: 0 the machine or template ended as asked, 1 an error (also told on the socket)."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Load a snapshot and serve forks of it
    Template(TemplateArgs),
    /// Boot a machine and serve it
    Boot(BootArgs),
    /// Serve forks that do nothing but the bare system calls: the floor of the benchmark
    #[command(hide = true)]
    Floor(TemplateArgs),
    /// Measure forks and branches with the built-in test guest
    Bench(BenchArgs),
    /// Say whether KVM can be used here, as JSON
    Check,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ProcessArgs {
    /// Number of the inherited control socket
    #[arg(long, value_name = "FD")]
    control_fd: RawFd,
    /// Number of an inherited listening seqpacket socket: a later controller connects here once the
    /// control socket is closed; without it the process ends then
    #[arg(long, value_name = "FD")]
    rendezvous_fd: Option<RawFd>,
    /// Keep the host's root and namespaces
    #[arg(long)]
    no_jail: bool,
    /// Do not filter system calls
    #[arg(long)]
    no_seccomp: bool,
}

impl ProcessArgs {
    fn process(&self) -> Process {
        Process {
            control_fd: self.control_fd,
            rendezvous_fd: self.rendezvous_fd,
            jail: !self.no_jail,
            seccomp: !self.no_seccomp,
        }
    }
}

#[derive(Debug, ClapArgs)]
#[command(
    after_help = "Example:\n  forkd-vmm template --control-fd 3 --id py --state py/state.bin --layer py/memory.bin,py/memory.index --disk root.erofs"
)]
pub(crate) struct TemplateArgs {
    #[command(flatten)]
    process: ProcessArgs,
    /// The snapshot's name; branches of its forks are relative to it
    #[arg(long)]
    id: String,
    /// State file
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// Memory and index file of a layer; repeat, the lowest layer first
    #[arg(long = "layer", value_name = "MEMORY,INDEX", required = true, value_parser = parse_layer)]
    layers: Vec<(PathBuf, PathBuf)>,
    /// A disk, read-only and shared by all forks; repeat in the machine's order
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
}

fn parse_layer(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let parts = text.split_once(',');
    parts
        .map(|(memory, index)| (memory.into(), index.into()))
        .ok_or_else(|| "give the memory file and the index file, separated by a comma".to_owned())
}

impl TemplateArgs {
    pub(crate) fn process(&self) -> Process {
        self.process.process()
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            id: self.id.clone(),
            state: self.state.clone(),
            layers: self.layers.clone(),
            disks: self.disks.clone(),
        }
    }
}

#[derive(Debug, ClapArgs)]
#[command(
    after_help = "Examples:\n  forkd-vmm boot --control-fd 3 --memory 512 --kernel vmlinuz --initramfs initrd --cmdline 'console=ttyS0' --disk root.erofs --console-fd 4\n  forkd-vmm boot --control-fd 3 --memory 64 --test-guest"
)]
pub(crate) struct BootArgs {
    #[command(flatten)]
    process: ProcessArgs,
    /// Guest memory, MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u32,
    /// vCPUs, 1 to 32
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Run the built-in test guest
    #[arg(long, conflicts_with = "kernel")]
    test_guest: bool,
    /// A bzImage or an uncompressed vmlinux
    #[arg(long, value_name = "FILE", required_unless_present = "test_guest")]
    kernel: Option<PathBuf>,
    /// Initial root file system
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "console=ttyS0 reboot=k panic=1"
    )]
    cmdline: String,
    /// A disk, read-only; repeat, the first is vda
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    /// Give the machine a network card with this address
    #[arg(long, value_name = "MAC", value_parser = parse_mac)]
    mac: Option<[u8; 6]>,
    /// Give the machine a socket device with this address, 3 or more
    #[arg(long, value_parser = clap::value_parser!(u32).range(3..))]
    cid: Option<u32>,
    /// Number of the inherited tap of the network card
    #[arg(long, value_name = "FD", requires = "mac")]
    tap_fd: Option<RawFd>,
    /// Number of the inherited listening stream socket of the socket device
    #[arg(long, value_name = "FD", requires = "cid")]
    vsock_fd: Option<RawFd>,
    /// Number of the inherited descriptor the serial console writes to
    #[arg(long, value_name = "FD")]
    console_fd: Option<RawFd>,
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let parts: Result<Vec<u8>, _> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16))
        .collect();
    let parts = parts.ok().and_then(|parts| <[u8; 6]>::try_from(parts).ok());
    parts.ok_or_else(|| "give six bytes, as in 02:00:00:00:00:01".to_owned())
}

impl BootArgs {
    pub(crate) fn process(&self) -> Process {
        self.process.process()
    }

    pub(crate) fn size(&self) -> Size {
        Size {
            memory_mib: self.memory,
            vcpus: self.vcpus,
        }
    }

    pub(crate) fn guest(&self) -> Result<Guest, Error> {
        let peripherals = Peripherals {
            disks: self.disks.clone(),
            mac: self.mac,
            cid: self.cid,
            tap_fd: self.tap_fd,
            vsock_fd: self.vsock_fd,
            console_fd: self.console_fd,
        };
        let Some(kernel) = self.kernel.clone() else {
            return Ok(Guest::Test(peripherals));
        };
        Ok(Guest::Linux(Box::new(LinuxGuest {
            kernel,
            initramfs: self.initramfs.clone(),
            command_line: self.cmdline.clone(),
            peripherals,
        })))
    }
}

#[derive(Debug, ClapArgs)]
#[command(
    after_help = "Examples:\n  forkd-vmm bench\n  forkd-vmm bench --json --rounds 5\n  forkd-vmm bench --quick"
)]
pub(crate) struct BenchArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Guest memory, MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u32,
    /// How often everything is measured, floor and figure in turn
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Leave out the thousand and most rounds: for a smoke test
    #[arg(long)]
    quick: bool,
    /// Measure another engine beside it, if its program is on PATH
    #[arg(long, value_name = "ENGINE", value_parser = ["firecracker"])]
    compare: Option<String>,
    /// How long to wait before each round for the machine to become quiet, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    patience: u64,
}

impl BenchArgs {
    pub(crate) fn options(&self) -> bench::Options {
        bench::Options {
            json: self.json,
            memory_mib: self.memory,
            rounds: if self.quick { 1 } else { self.rounds.max(1) },
            quick: self.quick,
            compare: self.compare.clone(),
            patience: std::time::Duration::from_secs(if self.quick { 0 } else { self.patience }),
        }
    }
}
