//! The daemon's settings, checked: whatever stands in a [`Config`] can be served.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use forkd_sandbox::{Admission, Isolation};

use crate::args::{EngineArgs, OnExit, ServeArgs};
use crate::paths::NodePaths;

/// Settings that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Anybody could take over the node.
    #[error(
        "refusing to listen on {0} without a token: whoever reaches it would own this machine; \
         give --token-file, or listen on 127.0.0.1"
    )]
    OpenToAll(SocketAddr),
    /// Half of a pair.
    #[error("--tls-cert and --tls-key only go together")]
    HalfTls,
    /// A limit of nothing.
    #[error("--{0} is 0, at least 1 is needed")]
    Zero(&'static str),
}

/// Checked settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on.
    pub bind: SocketAddr,
    /// Where the node keeps things.
    pub paths: NodePaths,
    /// What runs VMs.
    pub engine: EngineArgs,
    /// How sandboxes are kept apart.
    pub isolation: Isolation,
    /// How much the node takes on.
    pub admission: Admission,
    /// File of audit lines.
    pub audit_log: Option<PathBuf>,
    /// File or directory of tokens.
    pub token_file: Option<PathBuf>,
    /// Certificate chain and private key.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Branches made at once.
    pub branch_concurrency: usize,
    /// Open connections.
    pub max_connections: usize,
    /// What becomes of sandboxes when the daemon ends.
    pub on_exit: OnExit,
    /// How long running requests get to finish.
    pub drain: Duration,
}

impl Config {
    /// Checks what the command line said.
    pub fn from_args(args: ServeArgs) -> Result<Self, Error> {
        if !args.bind.ip().is_loopback() && args.token_file.is_none() {
            return Err(Error::OpenToAll(args.bind));
        }
        let tls = match (args.tls_cert, args.tls_key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err(Error::HalfTls),
        };
        if args.branch_concurrency == 0 {
            return Err(Error::Zero("branch-concurrency"));
        }
        if args.max_connections == 0 {
            return Err(Error::Zero("max-connections"));
        }
        let paths = args.paths.resolve();
        let audit_log = match args.audit_log {
            Some(path) if path.as_os_str() == "none" => None,
            Some(path) => Some(path),
            None if rustix::process::geteuid().is_root() => {
                Some(PathBuf::from("/var/log/forkd/audit.log"))
            }
            None => Some(paths.data.join("audit.log")),
        };
        Ok(Self {
            bind: args.bind,
            paths,
            isolation: args.isolation.with(&args.engine),
            admission: args.admission.admission(),
            engine: args.engine,
            audit_log,
            token_file: args.token_file,
            tls,
            branch_concurrency: args.branch_concurrency,
            max_connections: args.max_connections,
            on_exit: args.on_exit,
            drain: Duration::from_secs(args.drain_secs),
        })
    }
}

#[cfg(test)]
mod tests;
