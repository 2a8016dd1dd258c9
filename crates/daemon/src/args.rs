//! The flags of the daemon, each also an environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use forkd_engine::select::Options;
use forkd_sandbox::{Admission, Isolation};
use ipnet::IpNet;

use crate::paths::PathArgs;

/// Flags of `forkd-controller serve` and `forkd serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address to listen on. Any other than a loopback address needs --token-file.
    #[arg(
        long,
        env = "FORKD_BIND",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:8889"
    )]
    pub bind: SocketAddr,
    /// Where the node keeps things.
    #[command(flatten)]
    pub paths: PathArgs,
    /// What runs VMs.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// How sandboxes are kept apart.
    #[command(flatten)]
    pub isolation: IsolationArgs,
    /// How much the node takes on.
    #[command(flatten)]
    pub admission: AdmissionArgs,
    /// File of one JSON line per request; `none` writes nothing
    /// [default: /var/log/forkd/audit.log for root, DATA_DIR/audit.log otherwise].
    #[arg(long, env = "FORKD_AUDIT_LOG", value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// File or directory of bearer tokens. Without it everybody on this machine may do everything.
    #[arg(long, env = "FORKD_TOKEN_FILE", value_name = "PATH")]
    pub token_file: Option<PathBuf>,
    /// Certificate chain, PEM. Together with --tls-key.
    #[arg(long, env = "FORKD_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key, PEM. Together with --tls-cert.
    #[arg(long, env = "FORKD_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Branches made at once; more are answered with 503.
    #[arg(
        long,
        env = "FORKD_BRANCH_CONCURRENCY",
        value_name = "N",
        default_value_t = 4
    )]
    pub branch_concurrency: usize,
    /// Open connections; more are answered with 503 and closed.
    #[arg(
        long,
        env = "FORKD_MAX_CONNECTIONS",
        value_name = "N",
        default_value_t = 16384
    )]
    pub max_connections: usize,
    /// What becomes of sandboxes when the daemon ends.
    #[arg(long, env = "FORKD_ON_EXIT", value_name = "WHAT", value_enum, default_value_t = OnExit::Keep)]
    pub on_exit: OnExit,
    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(
        long,
        env = "FORKD_DRAIN_SECS",
        value_name = "SECS",
        default_value_t = 30
    )]
    pub drain_secs: u64,
    /// Accepted for older deployments; nothing is prewarmed by copying any more.
    #[arg(
        long,
        env = "FORKD_PREWARM_SCRATCH_DIR",
        value_name = "DIR",
        hide = true
    )]
    pub prewarm_scratch_dir: Option<PathBuf>,
}

/// What becomes of sandboxes when the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnExit {
    /// They go on, and the next daemon takes them over.
    Keep,
    /// They are killed, however the daemon ends.
    Kill,
}

/// Chooses the engine, and how it confines machines.
#[derive(Debug, Clone, Default, Args)]
pub struct EngineArgs {
    /// What runs VMs: `auto` takes kvm where the CPU can, qemu otherwise.
    #[arg(long, env = "FORKD_ENGINE", value_name = "NAME", value_enum, default_value_t = EngineName::Auto)]
    pub engine: EngineName,
    /// Whether sandboxes have a network unless they say otherwise.
    #[arg(long, env = "FORKD_NET", value_name = "MODE", value_enum, default_value_t = Net::Nat)]
    pub net: Net,
    /// Whether the processes of machines are confined. `off` is for finding faults only.
    #[arg(long, env = "FORKD_JAIL", value_name = "WHETHER", value_enum, default_value_t = Jail::On)]
    pub jail: Jail,
}

impl EngineArgs {
    /// The engine's own settings.
    pub fn options(&self) -> Options {
        Options {
            jail: self.jail == Jail::On,
        }
    }

    /// How sandboxes are kept apart by a command: nothing is prepared ahead.
    pub fn isolation(&self) -> Isolation {
        Isolation {
            network: self.net == Net::Nat,
            ..Isolation::default()
        }
    }
}

/// Whether sandboxes have a network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Net {
    /// They have none.
    None,
    /// They reach the public internet, and what their rules allow.
    #[default]
    Nat,
}

/// Whether the processes of machines are confined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Jail {
    /// They run as users of their own, in an empty root, with few system calls.
    #[default]
    On,
    /// They run as the daemon's user, and see what it sees.
    Off,
}

/// How a daemon keeps sandboxes apart.
#[derive(Debug, Clone, Args)]
pub struct IsolationArgs {
    /// Network slots that are kept ready for forks.
    #[arg(long, env = "FORKD_SLOTS", value_name = "N", default_value_t = 32)]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=4000))]
    pub slots: u32,
    /// Networks that sandboxes do not reach unless a rule allows it, besides private ones: a cluster's.
    #[arg(long, env = "FORKD_REFUSE", value_name = "CIDR", value_delimiter = ',')]
    pub refuse: Vec<IpNet>,
    /// Control group that sandboxes' groups are made in [default: forkd at the root of cgroup v2].
    #[arg(long, env = "FORKD_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Refuse to run sandboxes where this host cannot keep them apart in every way.
    #[arg(long, env = "FORKD_REQUIRE_ISOLATION")]
    pub require_isolation: bool,
}

impl IsolationArgs {
    /// Together with what the engine was told.
    pub fn with(&self, engine: &EngineArgs) -> Isolation {
        Isolation {
            slots_ready: if engine.net == Net::Nat {
                self.slots
            } else {
                0
            },
            refused: self.refuse.clone(),
            cgroup_root: self.cgroup_root.clone(),
            required: self.require_isolation,
            ..engine.isolation()
        }
    }
}

/// How much a node takes on. What would be too much is refused, before anything is done.
#[derive(Debug, Clone, Args)]
pub struct AdmissionArgs {
    /// Sandboxes there may be; more are answered with 429.
    #[arg(long, env = "FORKD_MAX_SANDBOXES", value_name = "N", default_value_t = Admission::default().sandboxes_max)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_sandboxes: u32,
    /// Virtual CPUs of all sandboxes together, for each processor that the daemon may use; more are answered with
    /// 429 [default: without bound].
    #[arg(long, env = "FORKD_MAX_VCPUS_PER_CPU", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_vcpus_per_cpu: Option<u32>,
    /// Memory left to everything else, of the host and of the daemon's own control group; what would take of it is
    /// answered with 507.
    #[arg(long, env = "FORKD_MEMORY_RESERVE_MIB", value_name = "MIB", default_value_t = Admission::default().memory_reserve_mib)]
    pub memory_reserve_mib: u64,
    /// Disk left free where snapshots, records and run directories are, at most a sixteenth of the file system; what would
    /// take of it is answered with 507.
    #[arg(long, env = "FORKD_DISK_RESERVE_MIB", value_name = "MIB", default_value_t = Admission::default().disk_reserve_mib)]
    pub disk_reserve_mib: u64,
}

impl AdmissionArgs {
    /// As the node takes it.
    pub fn admission(&self) -> Admission {
        Admission {
            sandboxes_max: self.max_sandboxes,
            vcpus_per_cpu: self.max_vcpus_per_cpu,
            memory_reserve_mib: self.memory_reserve_mib,
            disk_reserve_mib: self.disk_reserve_mib,
        }
    }
}

/// The engines by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum EngineName {
    /// kvm where the CPU can, qemu otherwise.
    #[default]
    Auto,
    /// The built-in monitor.
    Kvm,
    /// QEMU, with or without hardware virtualisation.
    Qemu,
    /// Firecracker 1.10 or later, from PATH; see docs/firecracker.md.
    Firecracker,
    /// Runs no VM; for tests of clients.
    #[value(hide = true)]
    Fake,
}
