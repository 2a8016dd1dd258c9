//! The agent as a process of this machine, and the host's client against it: real processes, real
//! files, real Python.
#![allow(missing_docs, reason = "tests")]

mod eval;
mod exec;
mod files;
mod guest;
mod link;
mod raw;
mod world;
