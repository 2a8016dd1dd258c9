//! The flags of the daemon, each also an environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

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

/// Chooses the engine.
#[derive(Debug, Clone, Default, Args)]
pub struct EngineArgs {
    /// What runs VMs: `auto` takes kvm where the CPU can, qemu otherwise.
    #[arg(long, env = "FORKD_ENGINE", value_name = "NAME", value_enum, default_value_t = EngineName::Auto)]
    pub engine: EngineName,
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
    /// Firecracker.
    Firecracker,
    /// Runs no VM; for tests of clients.
    #[value(hide = true)]
    Fake,
}
