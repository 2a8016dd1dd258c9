//! What can go wrong with an engine.

use std::io;
use std::path::PathBuf;

/// A step of an engine failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program that runs VMs is not there, or too old.
    #[error("{program} is not usable: {problem}; {remedy}")]
    Program {
        /// The program's name.
        program: String,
        /// What was found.
        problem: String,
        /// What the user can do.
        remedy: String,
    },
    /// The VM's process could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program's name.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VM's process ended.
    #[error("the VM's process ended ({exit}){}", output_tail(.output))]
    Exited {
        /// How it ended, in words.
        exit: String,
        /// The last lines it wrote, if any.
        output: String,
    },
    /// The VM's process did not answer in time.
    #[error("the VM's process did not finish {step:?} within {millis} ms")]
    Timeout {
        /// What was asked of it.
        step: &'static str,
        /// The limit.
        millis: u64,
    },
    /// The VM's process refused a command, or answered something not understood.
    #[error("the VM's process failed at {step:?}: {detail}")]
    Control {
        /// What was asked of it.
        step: &'static str,
        /// What it said.
        detail: String,
    },
    /// A file or socket of the VM could not be used.
    #[error("cannot {step} {}", .path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A snapshot cannot be used.
    #[error("snapshot file {} cannot be used: {problem}", .path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what would help.
        problem: String,
    },
    /// The snapshot was made on a host that differs from this one.
    #[error("the snapshot does not fit this host: {difference}")]
    Incompatible {
        /// The difference, named.
        difference: String,
    },
    /// The engine cannot do this at all.
    #[error("the {engine} engine cannot {what}")]
    Unsupported {
        /// The engine.
        engine: &'static str,
        /// What was asked.
        what: &'static str,
    },
}

fn output_tail(output: &str) -> String {
    if output.is_empty() {
        String::new()
    } else {
        format!(": {output}")
    }
}
