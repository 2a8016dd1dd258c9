//! What this host has and lacks, each with what to do about it.
//!
//! [`judge`] is pure: facts in, checks out. [`probe`] gathers the facts and never changes anything.

use serde::Serialize;

mod judge;
mod probe;

use forkd_daemon::{EngineName, NodePaths};

pub(crate) use judge::judge;
pub(crate) use probe::{Daemon, Findings, Place};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    /// As it should be.
    Ok,
    /// Works, but less well, or something optional is missing.
    Warn,
    /// Nothing works without it.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Whether a first sandbox cannot be had without it.
    #[serde(skip)]
    pub needed: bool,
}

impl Check {
    /// One line, and a second one with the remedy.
    pub(crate) fn line(&self) -> String {
        let mark = match self.status {
            Status::Ok => '✓',
            Status::Warn => '⚠',
            Status::Fail => '✗',
        };
        let line = format!("{mark} {:<14}{}", self.name, self.detail);
        match &self.remedy {
            Some(remedy) => format!("{line}\n  {:<14}→ {remedy}", ""),
            None => line,
        }
    }
}

/// What a first sandbox needs; the image's tools only while the image is still to be built.
pub(crate) fn needed(engine: EngineName, paths: &NodePaths, image: &str) -> Vec<Check> {
    let findings = Findings::gather(engine, paths, image);
    judge(&findings)
        .into_iter()
        .filter(|check| check.needed)
        .collect()
}
