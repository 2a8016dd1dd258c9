//! Measures forks and branches.
use std::process::ExitCode;
/// Options.
#[derive(Debug)]
pub struct Options { /// j
pub json: bool, /// m
pub memory_mib: u32, /// r
pub rounds: u32, /// q
pub quick: bool, /// c
pub compare: Option<String> }
/// Main.
pub fn main(_: &Options) -> ExitCode { ExitCode::SUCCESS }
