//! `forkd netns`.

use clap::{Args, Subcommand};

/// `forkd netns`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd netns setup 100
  forkd netns teardown --dry-run

Nobody has to: the daemon makes its own slots ahead (`forkd serve --slots`) and removes them. A slot is a
network namespace forkd-child-N with the guest's device forkd-tap0 in it; the guest is 10.42.0.2, its
gateway 10.42.0.1.")]
pub struct Netns {
    /// What to do.
    #[command(subcommand)]
    pub command: NetnsCommand,
}

/// What to do with network slots.
#[derive(Debug, Subcommand)]
pub enum NetnsCommand {
    /// Make network slots for any node of this host to take
    Setup(NetnsSetup),
    /// Remove every network slot that no running node has and nobody uses
    Teardown(NetnsTeardown),
}

/// `forkd netns setup`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd netns setup 100
  forkd netns setup 100 --json

Makes as many as are missing, so that N wait. Nodes take them instead of making their own, use each once
and remove it; run this again to make N wait again. Nothing is left when it fails or is interrupted.")]
pub struct NetnsSetup {
    /// How many are to wait
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4000))]
    pub count: u32,
    /// Print what waits as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd netns teardown`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd netns teardown --dry-run
  forkd netns teardown

Removes slots that were made ahead, that a killed daemon left, whose daemon's data were deleted, or that
bear our names without anybody's record. Slots of a running node, and slots that a process still uses,
are kept and told. With the last slot go the host's rules, unless a node runs.")]
pub struct NetnsTeardown {
    /// Tell what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print what became of each as JSON
    #[arg(long)]
    pub json: bool,
}
