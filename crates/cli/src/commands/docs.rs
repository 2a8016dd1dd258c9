//! `where`, `completions`, `man`, and the daemon in the foreground.

use std::path::Path;

use clap::CommandFactory;
use serde::Serialize;

use super::Context;
use crate::args::{Cli, Completions, Man, Where};
use crate::failure::Failure;
use crate::output;

/// `--json` of `forkd where`.
#[derive(Debug, Serialize)]
struct Places<'a> {
    data: &'a Path,
    state: &'a Path,
    snapshots: &'a Path,
    images: &'a Path,
    run: &'a Path,
}

/// `forkd where`
pub(super) fn places(context: &Context, args: &Where) -> Result<(), Failure> {
    let paths = context.common.paths();
    if !args.json {
        return output::line(&paths.data.display().to_string());
    }
    output::json(&Places {
        data: &paths.data,
        state: &paths.state,
        snapshots: &paths.snapshots,
        images: &paths.images,
        run: &paths.run,
    })
}

/// `forkd completions`
pub(super) fn completions(args: &Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "forkd", &mut script);
    output::bytes(&script)
}

/// `forkd man`
pub(super) fn man(args: &Man) -> Result<(), Failure> {
    clap_mangen::generate_to(Cli::command(), &args.dir).map_err(|error| {
        let what = format!("cannot write manual pages into {}", args.dir.display());
        Failure::caused(what, &error).with_help("name an existing directory that you may write to")
    })
}
