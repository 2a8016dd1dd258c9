//! Commands that reach into a sandbox.

use std::time::Duration;

use clap::Args;
use forkd_wire::id::SandboxId;

use super::pair;
use crate::human::parse_duration;

/// `forkd exec`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd exec sb-1a2b -- uname -a
  forkd exec sb-1a2b --cwd /srv --env DEBUG=1 -- python3 app.py
  echo 'select 1' | forkd exec sb-1a2b -- psql
  forkd exec sb-1a2b --timeout 30s -- make test

Standard output and standard error come as the command writes them. Standard input is passed on when
it is a file or a pipe; from a terminal only with -i. No shell is involved: write
`-- sh -c '…'` for one.

Exit codes: those of the command; 128+N when signal N ended it; 124 its time was up; 125 forkd
failed; 126 the guest cannot run it; 127 the guest has no such command; 130 interrupted (the command
in the guest is killed).")]
pub struct Exec {
    /// The sandbox
    pub id: SandboxId,
    /// Pass on standard input also from a terminal
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command an empty standard input
    #[arg(long, conflicts_with = "interactive")]
    pub no_stdin: bool,
    /// Kill the command after this long, such as 30s
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Environment of the command
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = pair)]
    pub env: Vec<(String, String)>,
    /// Working directory in the guest
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Print one JSON object with exit code, stdout and stderr when the command is over
    #[arg(long)]
    pub json: bool,
    /// Command and arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `forkd eval`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd eval sb-1a2b -- 'numpy.linalg.det([[1, 2], [3, 4]])'
  forkd eval sb-1a2b -- 'x = 41' && forkd eval sb-1a2b -- 'x + 1'
  forkd eval sb-1a2b - < script.py

The code runs in the interpreter that was warmed before the snapshot; names stay between calls. What it
prints goes to standard output, followed by the value of the last expression.

Exit codes: 0 it ran, 1 it raised, or the sandbox could not be reached.")]
pub struct Eval {
    /// The sandbox
    pub id: SandboxId,
    /// Interrupt the code after this long
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Print the answer as JSON
    #[arg(long)]
    pub json: bool,
    /// Expression or statements, or - for standard input
    #[arg(required = true, value_name = "CODE")]
    pub code: Vec<String>,
}

/// `forkd cp`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd cp data.csv sb-1a2b:/srv/data.csv
  forkd cp sb-1a2b:/srv/out ./out              a directory, through the guest's tar
  tar c src | forkd cp - sb-1a2b:/srv/src.tar
  forkd cp sb-1a2b:/etc/os-release -

One of the two sides is ID:PATH. A local name that holds a colon is written with ./ before it.")]
pub struct Cp {
    /// Local path, ID:PATH, or - for standard input
    pub source: String,
    /// Local path, ID:PATH, or - for standard output
    pub target: String,
}

/// `forkd logs`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  forkd logs sb-1a2b\n  forkd logs --follow sb-1a2b")]
pub struct Logs {
    /// The sandbox
    pub id: SandboxId,
    /// Go on until the sandbox is gone
    #[arg(short, long)]
    pub follow: bool,
}

/// `forkd ping`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  forkd ping sb-1a2b\n  forkd ping sb-1a2b --json")]
pub struct Ping {
    /// The sandbox
    pub id: SandboxId,
    /// Print the answer as JSON
    #[arg(long)]
    pub json: bool,
}
