//! The agent as a process of this machine, and the host's client against it: real processes, real
//! files, real Python.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::type_complexity,
    reason = "tests"
)]

mod eval;
mod exec;
mod files;
mod guest;
mod link;
mod network;
mod raw;
mod world;
