//! The lab: a virtual node with true hardware virtualisation, emulated.
//!
//! The host may have no usable virtualisation. QEMU emulates a CPU that has it, Debian's cloud
//! kernel runs on that CPU, and the programs of this repository find a /dev/kvm inside that
//! behaves as on a bare machine. The kernel, its modules and the node's root come from Debian
//! packages and are kept under `target/lab`.
//!
//! ```text
//!   host ── qemu (tcg, svm) ── node: Debian kernel, kvm-amd ── forkd-vmm ── guest: Debian kernel
//! ```

mod command;
mod inputs;
mod kernel;
mod newc;
mod node;
mod root;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::output;
use kernel::Kernel;
use node::{Node, Outcome};

/// What the node itself loads before the suite starts.
const NODE_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "erofs",
    "overlay",
    "kvm_amd",
    "tun",
    "veth",
    "bridge",
    "nf_tables",
    "nft_chain_nat",
    "nft_masq",
    "nft_nat",
    "nft_ct",
    "nft_log",
    "nft_limit",
    "nft_reject_inet",
    "loop",
    "vhost_vsock",
    "fuse",
];

/// How many nodes may hang in a run. None should: see `node::COMMAND_LINE`.
const RESTARTS: u32 = 2;

/// How to run the lab.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The script run inside, instead of the suite
    #[arg(long)]
    script: Option<PathBuf>,
    /// More files or directories, given inside as /lab/in/NAME
    #[arg(long = "input")]
    inputs: Vec<PathBuf>,
    /// Test programs, as PACKAGE or PACKAGE:TEST, and =WORDS for those tests only whose name contains one of them
    /// (default: forkd-vmm:lab, and of forkd-engine those of kvm and firecracker)
    #[arg(long = "test")]
    tests: Vec<String>,
    /// Packages whose programs are given inside on PATH (default: forkd-vmm and forkd-cli)
    #[arg(long = "program")]
    programs: Vec<String>,
    /// Only tests whose name contains this
    #[arg(long, default_value = "")]
    filter: String,
    /// Seconds until the node is stopped and the run has failed
    #[arg(long, default_value_t = 1500)]
    limit: u64,
    /// A data directory of forkd with an image store in it, made by `make test-image`; with it the suite also
    /// boots real images
    #[arg(long)]
    data: Option<PathBuf>,
    /// Leave out what takes long
    #[arg(long)]
    short: bool,
    /// Memory of the node
    #[arg(long, default_value_t = 4096)]
    memory_mib: u32,
    /// CPUs of the node. With more than one it may hang: QEMU 7.2 protects code against changes only after it
    /// has translated it, so one CPU may run on in what another, which patches its kernel (KVM does with the
    /// first and the last VM), has just taken back
    #[arg(long, default_value_t = 1)]
    cpus: u32,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the lab could not be prepared")]
    Prepare(#[from] command::Error),
    #[error("the lab did not run to its end")]
    Node(#[from] node::Error),
}

/// Prepares the lab, runs the suite in it, and reports. The last line is `N passed, N failed`.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    let target = target_directory();
    let cache = target.join("lab");
    fs::create_dir_all(&cache).map_err(command::Error::file(&cache))?;
    output::step("preparing the kernel");
    let kernel = Kernel::prepare(&cache)?;
    output::step("preparing the root (about a minute the first time)");
    let root = root::prepare(&cache)?;
    output::step("building programs and tests");
    let run = cache.join("run");
    fs::remove_dir_all(&run).ok();
    fs::create_dir_all(&run).map_err(command::Error::file(&run))?;
    let initramfs = inputs::node_initramfs(&cache, &kernel, NODE_MODULES, &run)?;
    let inputs = inputs::pack(args, &cache, &kernel, &run)?;
    output::step("booting the node");
    let started = Instant::now();
    let node = Node {
        kernel: &kernel.image,
        initramfs: &initramfs,
        root: &root,
        inputs: &inputs,
        memory_mib: args.memory_mib,
        cpus: args.cpus,
        limit: Duration::from_secs(args.limit),
    };
    let mut outcome = Outcome::default();
    let hung = run_to_the_end(&node, &run, &mut outcome)?;
    collect(&run)?;
    for name in &outcome.failed {
        output::step(&format!("failed: {name}"));
    }
    output::step(&format!(
        "the node ran for {:.0} s",
        started.elapsed().as_secs_f32()
    ));
    if hung > 0 {
        output::step(&format!(
            "WARNING: {hung} of the nodes hung; what each had answered was kept. Their kernels' logs are {}",
            run.join("hung-*.log").display()
        ));
    }
    // A script that ended badly without naming a failure is one.
    let unnamed = usize::from(outcome.code != 0 && outcome.failed.is_empty());
    output::line(&format!(
        "{} passed, {} failed",
        outcome.passed(),
        outcome.failed.len() + unnamed
    ));
    Ok(ExitCode::from(
        outcome.code.max(u8::from(!outcome.failed.is_empty())),
    ))
}

/// Boots nodes until one comes to its end, and returns how many hung before that, at most [`RESTARTS`].
fn run_to_the_end(node: &Node<'_>, run: &Path, outcome: &mut Outcome) -> Result<u32, node::Error> {
    let mut hung = 0;
    loop {
        match node.run(run, outcome) {
            Err(node::Error::Stalled { log }) if hung < RESTARTS => {
                hung += 1;
                let kept = run.join(format!("hung-{hung}.log"));
                fs::rename(&log, &kept).ok();
                output::step(&format!(
                    "WARNING: the node hangs (its kernel's log is {}); the rest is run in another, {} passed so far",
                    kept.display(),
                    outcome.passed()
                ));
            }
            ended => return ended.map(|()| hung),
        }
    }
}

/// Unpacks what the suite left in `/out` to `target/lab/run/out`.
fn collect(run: &Path) -> Result<(), command::Error> {
    let out = run.join("out");
    let results = run.join("results.tar");
    fs::create_dir_all(&out).map_err(command::Error::file(&out))?;
    command::run(
        Command::new("tar")
            .arg("-xf")
            .arg(&results)
            .arg("-C")
            .arg(&out),
        "install the package tar",
    )?;
    fs::remove_file(&results).map_err(command::Error::file(&results))
}

/// The directory cargo built this program into.
fn target_directory() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let found = program.ancestors().nth(2).map(Path::to_owned);
    found.unwrap_or_else(|| PathBuf::from("target"))
}
