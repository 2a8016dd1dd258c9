//! The command line: what may be typed, with its help and examples. No decisions.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

mod guest;
mod image;
mod netns;
mod node;
mod pairs;

pub use guest::{Cp, Eval, Exec, Logs, Ping};
pub use image::{Image, ImageBuild, ImageCommand, ImageRemove};
pub use netns::{Netns, NetnsCommand, NetnsSetup, NetnsTeardown};
pub use node::{
    Bench, Branch, Doctor, Fork, Images, Kill, Ls, Network, One, Quickstart, RemoveSnapshot,
    Snapshot, SnapshotInfo,
};
pub use pairs::pair;

/// Fork warmed Linux machines in milliseconds
#[derive(Debug, Parser)]
#[command(
    name = "forkd",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "\
Examples:
  forkd quickstart                       build, warm, snapshot and fork ten machines
  forkd doctor                           what this host has and lacks
  forkd serve &                          run the daemon; then fork, exec, branch, kill
  forkd fork --tag quickstart -n 3
  forkd exec ID -- uname -a

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. `forkd exec` ends with the code of the
guest's command, or 124 time is up, 125 forkd failed, 126 cannot be run, 127 not found."
)]
pub struct Cli {
    /// Where the daemon is and where data lives.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Common options")]
pub struct Common {
    /// Address of the daemon, http:// or https://, or `none` [default: http://127.0.0.1:8889 if one
    /// answers]
    #[arg(
        long,
        env = "FORKD_URL",
        global = true,
        value_name = "URL",
        hide_env = true
    )]
    pub daemon_url: Option<String>,

    /// Token for the daemon; better given in FORKD_TOKEN, where no process list shows it
    #[arg(
        long,
        env = "FORKD_TOKEN",
        global = true,
        value_name = "TOKEN",
        hide_env = true
    )]
    pub daemon_token: Option<String>,

    /// Directory of images, snapshots and records used without a daemon [default: /var/lib/forkd]
    #[arg(
        long,
        env = "FORKD_DATA_DIR",
        global = true,
        value_name = "DIR",
        hide_env = true
    )]
    pub data_dir: Option<PathBuf>,
}

impl Common {
    /// Where the node keeps things: the environment's word, over it the command line's.
    pub fn paths(&self) -> forkd_daemon::NodePaths {
        let FromEnvironment { mut paths } = FromEnvironment::parse_from(["forkd"]);
        if self.data_dir.is_some() {
            paths.data_dir.clone_from(&self.data_dir);
        }
        paths.resolve()
    }
}

/// The daemon's own places, so that a node within this process is the one a daemon would open.
#[derive(Debug, Parser)]
struct FromEnvironment {
    #[command(flatten)]
    paths: forkd_daemon::PathArgs,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// From nothing to ten answering sandboxes, step by step
    Quickstart(Quickstart),
    /// Check what this host has, what it lacks and what to do about it
    Doctor(Doctor),
    /// Build, list and remove what guests boot
    Image(Image),
    /// Freeze a booted and warmed machine, or a running sandbox, under a tag
    Snapshot(Snapshot),
    /// List snapshots
    #[command(visible_alias = "snapshots")]
    Images(Images),
    /// Show one snapshot with its ancestors and dependents
    SnapshotInfo(SnapshotInfo),
    /// Remove snapshots
    Rmi(RemoveSnapshot),
    /// Run the daemon in the foreground
    Serve(Box<forkd_daemon::ServeArgs>),
    /// Fork sandboxes from a snapshot
    #[command(visible_alias = "spawn")]
    Fork(Fork),
    /// List sandboxes
    Ls(Ls),
    /// Kill sandboxes
    Kill(Kill),
    /// Stop a sandbox's processors
    Pause(One),
    /// Let a paused sandbox go on
    Resume(One),
    /// Show or change what a running sandbox may reach
    Network(Network),
    /// Make network slots before a node needs them, or take all away
    Netns(Netns),
    /// Freeze a running sandbox into a new snapshot while it goes on
    Branch(Branch),
    /// Run a command in a sandbox
    Exec(Exec),
    /// Run Python code in a sandbox's warmed interpreter
    Eval(Eval),
    /// Copy files and directories into and out of a sandbox
    Cp(Cp),
    /// Show a sandbox's console
    Logs(Logs),
    /// Ask a sandbox's agent whether it is there
    Ping(Ping),
    /// Measure fork, agent, exec, eval, kill and memory on this node
    Bench(Bench),
    /// Print where data lives
    Where(Where),
    /// Print a completion script for a shell
    Completions(Completions),
    /// Write manual pages into a directory
    #[command(hide = true)]
    Man(Man),
}

/// `forkd where`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  forkd where\n  du -sh \"$(forkd where)\"")]
pub struct Where {
    /// Print every path as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd completions`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd completions bash > /etc/bash_completion.d/forkd
  forkd completions zsh > \"${fpath[1]}/_forkd\"")]
pub struct Completions {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// `forkd man`
#[derive(Debug, Args)]
pub struct Man {
    /// An existing directory, such as /usr/local/share/man/man1
    pub dir: PathBuf,
}

#[cfg(test)]
mod tests;
