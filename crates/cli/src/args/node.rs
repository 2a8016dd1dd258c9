//! Commands about the node: snapshots, sandboxes, quickstart, doctor and bench.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use forkd_daemon::{EngineArgs, Net};
use forkd_wire::id::{SandboxId, Tag};

use super::pair;
use crate::human::parse_duration;

/// `forkd quickstart`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd quickstart
  forkd quickstart -n 50
  forkd quickstart --json | jq .ready_ms

Builds an image with Python and numpy, boots it, imports numpy, snapshots it under the tag
`quickstart`, forks it N times and lets every fork compute something else. Results are checked on the
host, everything is killed at the end. Image and snapshot are kept and reused by the next run.

Exit codes: 0 every sandbox answered, 1 otherwise, 130 interrupted.")]
pub struct Quickstart {
    /// How many sandboxes to fork
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub n: u32,
    /// Print one JSON object instead of the table
    #[arg(long)]
    pub json: bool,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// `forkd doctor`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd doctor
  forkd doctor --json | jq '.checks[] | select(.status != \"ok\")'

Exit codes: 0 nothing is missing (warnings are allowed), 1 something is.")]
pub struct Doctor {
    /// Print the checks as JSON
    #[arg(long)]
    pub json: bool,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// `forkd snapshot`
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("source").required(true).args(["image", "from_sandbox"]),
    after_help = "\
Examples:
  forkd snapshot --tag py --image python3-numpy --warm 'import numpy'
  forkd snapshot --tag web --image app --memory 1024 --warm-cmd 'systemctl start app'
  forkd snapshot --tag mid --from-sandbox sb-1a2b      freeze a running sandbox"
)]
pub struct Snapshot {
    /// Name of the new snapshot
    #[arg(long, required_unless_present = "from_sandbox")]
    pub tag: Option<Tag>,
    /// Image to boot, a name of `forkd image ls`
    #[arg(long, value_name = "NAME")]
    pub image: Option<String>,
    /// Sandbox to freeze; it goes on running
    #[arg(long, value_name = "ID")]
    pub from_sandbox: Option<SandboxId>,
    /// Memory of the machine in MiB
    #[arg(
        long,
        value_name = "MIB",
        default_value_t = 512,
        conflicts_with = "from_sandbox"
    )]
    #[arg(value_parser = clap::value_parser!(u64).range(64..=262_144))]
    pub memory: u64,
    /// Processors of the machine
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        conflicts_with = "from_sandbox"
    )]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=32))]
    pub vcpus: u32,
    /// Python code to run before the freeze; the forks inherit what it did
    #[arg(long, value_name = "CODE", conflicts_with_all = ["from_sandbox", "warm_cmd"])]
    pub warm: Option<String>,
    /// Shell command to run before the freeze; it must succeed
    #[arg(long, value_name = "COMMAND", conflicts_with = "from_sandbox")]
    pub warm_cmd: Option<String>,
    /// Write all memory of the sandbox instead of what differs from its snapshot
    #[arg(long, requires = "from_sandbox")]
    pub full: bool,
    /// Print the snapshot as JSON
    #[arg(long)]
    pub json: bool,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// `forkd images`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  forkd images\n  forkd images --json | jq -r '.[].tag'")]
pub struct Images {
    /// Print the list as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd snapshot-info`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  forkd snapshot-info py\n  forkd snapshot-info py --json")]
pub struct SnapshotInfo {
    /// The snapshot
    pub tag: Tag,
    /// Print it as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd rmi`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd rmi py
  forkd rmi --cascade py       with its branches and their sandboxes")]
pub struct RemoveSnapshot {
    /// Snapshots to remove
    #[arg(required = true, value_name = "TAG")]
    pub tags: Vec<Tag>,
    /// Remove branches of it too, and kill the sandboxes of all of them
    #[arg(long)]
    pub cascade: bool,
}

/// `forkd fork`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd fork --tag py -n 3
  forkd fork --tag py --env MODEL=small --metadata run=42 --timeout 10m
  forkd fork --tag py --json | jq -r '.sandboxes[0].id'

Answers when every sandbox's agent has answered. The ids go to standard output, one per line. Needs a
daemon, because the sandboxes stay: `forkd serve &`.")]
pub struct Fork {
    /// Snapshot to fork
    #[arg(long)]
    pub tag: Tag,
    /// How many sandboxes
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub n: u32,
    /// Environment of every process in the sandboxes
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub env: Vec<(String, String)>,
    /// Your own words about the sandboxes, shown by `forkd ls --json`
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub metadata: Vec<(String, String)>,
    /// Kill the sandboxes after this long, such as 10m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Memory limit of each machine's process in MiB
    #[arg(long, value_name = "MIB")]
    pub memory_limit_mib: Option<u64>,
    /// Processor time of each machine's process in thousandths of one processor
    #[arg(long, value_name = "MILLI")]
    pub cpu_limit_milli: Option<u64>,
    /// Processes and threads of each machine's process [default: 512]
    #[arg(long, value_name = "N")]
    pub pids_limit: Option<u64>,
    /// MiB that each machine's process may read from a disk in a second
    #[arg(long, value_name = "MIB")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub io_read_limit_mib: Option<u64>,
    /// MiB that each machine's process may write to a disk in a second
    #[arg(long, value_name = "MIB")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub io_write_limit_mib: Option<u64>,
    /// Reads of a disk in a second, by each machine's process
    #[arg(long, value_name = "N")]
    pub io_read_limit_iops: Option<u64>,
    /// Writes to a disk in a second, by each machine's process
    #[arg(long, value_name = "N")]
    pub io_write_limit_iops: Option<u64>,
    /// Whether the sandboxes have a network [default: nat where the node can]
    #[arg(long, value_name = "MODE", value_enum)]
    pub net: Option<Net>,
    /// What the sandboxes may reach besides the public internet, such as 10.1.0.0/16 or example.com:443
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<String>,
    /// What the sandboxes may not reach; `all` leaves what --allow names
    #[arg(long, value_name = "RULE")]
    pub deny: Vec<String>,
    /// Keep those that succeeded when some fail
    #[arg(long)]
    pub partial: bool,
    /// Print the sandboxes with their timings as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd ls`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd ls
  forkd ls --tag py --json | jq -r '.[].id'")]
pub struct Ls {
    /// Only sandboxes of this snapshot
    #[arg(long)]
    pub tag: Option<Tag>,
    /// Only ids, one per line
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print the list as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd kill`
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("which").required(true).args(["ids", "all", "tag"]),
    after_help = "\
Examples:
  forkd kill sb-1a2b sb-3c4d
  forkd kill --tag py
  forkd kill --all"
)]
pub struct Kill {
    /// Sandboxes to kill
    #[arg(value_name = "ID")]
    pub ids: Vec<SandboxId>,
    /// Kill every sandbox
    #[arg(long)]
    pub all: bool,
    /// Kill every sandbox of this snapshot
    #[arg(long)]
    pub tag: Option<Tag>,
}

/// `forkd network`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd network sb-1a2b
  forkd network sb-1a2b --deny all --allow pypi.org:443 --allow '*.pythonhosted.org:443'
  forkd network sb-1a2b --default

A rule names a network, an address, a domain (*.example.com for all below it) or `all`, and may end in a
port. --allow wins over --deny, and both win over the default, which is the public internet. This machine,
link-local addresses with the clouds' metadata services among them, and other sandboxes are never reached.
Without rules, what is in force is shown.")]
pub struct Network {
    /// The sandbox
    pub id: SandboxId,
    /// What it may reach besides the public internet
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<String>,
    /// What it may not reach
    #[arg(long, value_name = "RULE")]
    pub deny: Vec<String>,
    /// Take all rules away
    #[arg(long, conflicts_with_all = ["allow", "deny"])]
    pub default: bool,
    /// Print what is in force as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd pause` and `forkd resume`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  forkd pause sb-1a2b\n  forkd resume sb-1a2b")]
pub struct One {
    /// The sandbox
    pub id: SandboxId,
}

/// `forkd branch`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd branch sb-1a2b --tag before-the-edit
  forkd fork --tag \"$(forkd branch sb-1a2b)\" -n 5

Prints the new snapshot's tag.")]
pub struct Branch {
    /// The sandbox
    pub id: SandboxId,
    /// Name of the new snapshot [default: made up]
    #[arg(long)]
    pub tag: Option<Tag>,
    /// Write all of its memory instead of what differs from its snapshot
    #[arg(long)]
    pub full: bool,
    /// Answer before the files are written; forking works at once where the engine can
    #[arg(long)]
    pub no_wait: bool,
    /// Print the snapshot as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd bench`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd bench --tag quickstart --n 20
  forkd bench --tag py --n 50 --html bench.html
  forkd bench --tag py --json > bench.json

Forks N sandboxes at once, measures every stage of each, and kills them. Times are told as median,
99th percentile and maximum; memory as PSS (shared pages divided among their users) and private
(pages nobody else maps) of the machines' processes.")]
pub struct Bench {
    /// Snapshot to fork
    #[arg(long)]
    pub tag: Tag,
    /// How many sandboxes
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub n: u32,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
    /// Write one self-contained page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}
