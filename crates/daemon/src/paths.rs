//! Where the daemon keeps things, and the flags that say so.

use std::path::{Path, PathBuf};

use clap::Args;

/// Flags that place the node's files. Without them, root gets the system's places and everybody else
/// those of the XDG base directories.
#[derive(Debug, Clone, Default, Args)]
pub struct PathArgs {
    /// Directory of everything that outlives the daemon.
    #[arg(long, env = "FORKD_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Record of snapshots and sandboxes [default: DATA_DIR/state.db].
    #[arg(long, env = "FORKD_STATE", value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Directory of the snapshots [default: DATA_DIR/snapshots].
    #[arg(long, env = "FORKD_SNAPSHOT_ROOT", value_name = "DIR")]
    pub snapshot_root: Option<PathBuf>,
    /// Directory of the guest images [default: DATA_DIR/images].
    #[arg(long, env = "FORKD_IMAGE_ROOT", value_name = "DIR")]
    pub image_root: Option<PathBuf>,
    /// Directory of sockets and consoles of running VMs [default: /run/forkd].
    #[arg(long, env = "FORKD_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

/// Where a node keeps things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePaths {
    /// Everything that outlives the daemon.
    pub data: PathBuf,
    /// Record of snapshots and sandboxes.
    pub state: PathBuf,
    /// Snapshots.
    pub snapshots: PathBuf,
    /// Guest images.
    pub images: PathBuf,
    /// Sockets and consoles of running VMs.
    pub run: PathBuf,
}

impl NodePaths {
    /// All places below one directory; for tests and for a node of one command.
    pub fn below(data: &Path, run: &Path) -> Self {
        Self {
            data: data.to_owned(),
            state: data.join("state.db"),
            snapshots: data.join("snapshots"),
            images: data.join("images"),
            run: run.to_owned(),
        }
    }

    /// The record of workspaces, beside that of snapshots and sandboxes.
    pub fn workspaces(&self) -> PathBuf {
        self.state.with_extension("workspaces.json")
    }
}

impl PathArgs {
    /// The places these flags name, the defaults for the rest.
    pub fn resolve(&self) -> NodePaths {
        let root = rustix::process::geteuid().is_root();
        let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let data = self.data_dir.clone();
        let data = data.unwrap_or_else(|| default_data(root, env("XDG_DATA_HOME"), env("HOME")));
        let run = self.run_dir.clone();
        let run = run.unwrap_or_else(|| default_run(root, env("XDG_RUNTIME_DIR"), &data));
        let below = NodePaths::below(&data, &run);
        NodePaths {
            state: self.state.clone().unwrap_or(below.state),
            snapshots: self.snapshot_root.clone().unwrap_or(below.snapshots),
            images: self.image_root.clone().unwrap_or(below.images),
            data,
            run,
        }
    }
}

fn default_data(root: bool, xdg: Option<PathBuf>, home: Option<PathBuf>) -> PathBuf {
    let own = || xdg.or_else(|| home.map(|home| home.join(".local/share")));
    match (root, own()) {
        (false, Some(base)) if base.is_absolute() => base.join("forkd"),
        _ => PathBuf::from("/var/lib/forkd"),
    }
}

fn default_run(root: bool, xdg: Option<PathBuf>, data: &Path) -> PathBuf {
    match (root, xdg) {
        (true, _) => PathBuf::from("/run/forkd"),
        (false, Some(base)) if base.is_absolute() => base.join("forkd"),
        _ => data.join("run"),
    }
}

#[cfg(test)]
mod tests;
