//! Packet rules, through the `nft` program.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

const PROGRAM: &str = "nft";

/// Why rules are not in force.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program cannot be run.
    #[error("cannot run nft; install the package nftables")]
    Run(#[source] io::Error),
    /// The rules are refused.
    #[error("nft refuses the rules: {0}; the kernel needs nf_tables, and this needs CAP_NET_ADMIN")]
    Refused(String),
}

/// Applies a ruleset in the network namespace of this thread: all of it, or nothing.
pub fn apply(rules: &str) -> Result<(), Error> {
    run(&["-f", "-"], rules).map(drop)
}

/// The rules of a table as `nft` prints them; `None` when there is no such table.
pub fn table(family: &str, name: &str) -> Result<Option<String>, Error> {
    match run(&["-n", "list", "table", family, name], "") {
        Ok(text) => Ok(Some(text)),
        Err(Error::Refused(said)) if said.contains("No such file") => Ok(None),
        Err(e) => Err(e),
    }
}

fn run(args: &[&str], input: &str) -> Result<String, Error> {
    let mut child = Command::new(PROGRAM)
        .args(args)
        // Ctrl-C is for whoever runs it: what that undoes must not fail halfway.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::Run)?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it ended early, what it said about it is the better error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(Error::Run)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Refused(said.trim().replace('\n', "; ")))
}
