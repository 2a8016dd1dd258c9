//! Chores of the repository, run as `cargo xtask CHORE`.

#![forbid(unsafe_code)]

mod lab;
mod output;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "xtask", about = "Chores of the forkd repository")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Boot the lab, an emulated node with true hardware virtualisation, and run a suite in it
    Lab(lab::Args),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().chore {
        Chore::Lab(args) => lab::run(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}
