//! One file per command, or per family of commands that share their ways.

use std::process::ExitCode;

use crate::args::{Cli, Command, Common};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::output;

mod bench;
mod copy;
mod docs;
mod doctor;
mod eval;
mod exec;
mod fork;
mod image;
mod netns;
mod network;
mod quickstart;
mod sandboxes;
mod snapshots;

/// What every command gets besides its own arguments.
#[derive(Debug)]
pub(crate) struct Context {
    /// Options of every command.
    pub common: Common,
    /// Told when a signal comes.
    pub interrupt: Interrupt,
}

/// Runs a command; what it has to say is said.
pub(crate) async fn run(cli: Cli) -> ExitCode {
    let interrupt = match Interrupt::listen() {
        Ok(interrupt) => interrupt,
        Err(failure) => return end(&failure),
    };
    let context = Context {
        common: cli.common,
        interrupt,
    };
    match dispatch(&context, cli.command).await {
        Ok(code) => ExitCode::from(code),
        Err(failure) => end(&failure),
    }
}

fn end(failure: &Failure) -> ExitCode {
    output::failure(failure);
    ExitCode::from(failure.exit())
}

async fn dispatch(context: &Context, command: Command) -> Result<u8, Failure> {
    let done = match command {
        Command::Quickstart(args) => return quickstart::run(context, &args).await,
        Command::Doctor(args) => return doctor::run(context, &args).await,
        Command::Exec(args) => return exec::run(context, &args).await,
        Command::Eval(args) => return eval::run(context, &args).await,
        Command::Kill(args) => return sandboxes::kill(context, &args).await,
        Command::Image(args) => image::run(context, args.command).await,
        Command::Snapshot(args) => snapshots::create(context, &args).await,
        Command::Images(args) => snapshots::list(context, &args).await,
        Command::SnapshotInfo(args) => snapshots::info(context, &args).await,
        Command::Rmi(args) => snapshots::remove(context, &args).await,
        Command::Serve(_) => Err(Failure::new("the daemon is started before anything else")),
        Command::Fork(args) => fork::run(context, &args).await,
        Command::Ls(args) => sandboxes::list(context, &args).await,
        Command::Pause(args) => sandboxes::pause(context, &args).await,
        Command::Resume(args) => sandboxes::resume(context, &args).await,
        Command::Network(args) => network::run(context, &args).await,
        Command::Netns(args) => netns::run(context, args.command).await,
        Command::Branch(args) => sandboxes::branch(context, &args).await,
        Command::Cp(args) => copy::run(context, &args).await,
        Command::Logs(args) => sandboxes::logs(context, &args).await,
        Command::Ping(args) => sandboxes::ping(context, &args).await,
        Command::Bench(args) => bench::run(context, &args).await,
        Command::Where(args) => docs::places(context, &args),
        Command::Completions(args) => docs::completions(&args),
        Command::Man(args) => docs::man(&args),
    };
    done.map(|()| crate::failure::exit::OK)
}
