//! `ls`, `kill`, `pause`, `resume`, `branch`, `logs`, `ping`: sandboxes that a daemon runs.

use forkd_wire::api::sandbox::{BranchMode, BranchSandbox, SandboxInfo, SandboxState};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use futures_util::StreamExt;

use super::Context;
use crate::args::{Branch, Kill, Logs, Ls, One, Ping};
use crate::client::Client;
use crate::client::api::each_chunk;
use crate::failure::{Failure, exit};
use crate::session::Session;
use crate::table::Table;
use crate::{human, output};

/// Sandboxes killed at the same time; each kill waits for a process to end.
const KILLS_AT_ONCE: usize = 16;

/// `forkd ls`
pub(super) async fn list(context: &Context, args: &Ls) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let list = context
        .interrupt
        .guard(client.sandboxes(args.tag.as_ref()))
        .await?;
    if args.json {
        return output::json(&list);
    }
    if args.quiet {
        return list
            .iter()
            .try_for_each(|sandbox| output::line(sandbox.id.as_str()));
    }
    output::data(&table(&list, human::now_unix()).render())
}

/// The table of `forkd ls`.
pub(crate) fn table(list: &[SandboxInfo], now: u64) -> Table {
    let mut table = Table::new(&[
        "ID",
        "SNAPSHOT",
        "STATE",
        ">AGE",
        ">PID",
        ">BRANCHES",
        "ENGINE",
    ]);
    for sandbox in list {
        table.row([
            sandbox.id.to_string(),
            sandbox.snapshot_tag.to_string(),
            state(sandbox.state).to_owned(),
            human::age(now.saturating_sub(sandbox.created_at_unix)),
            sandbox
                .pid
                .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            sandbox.branch_count.to_string(),
            sandbox.engine.clone(),
        ]);
    }
    table
}

fn state(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Starting => "starting",
        SandboxState::Running => "running",
        SandboxState::Paused => "paused",
        SandboxState::Stopping => "stopping",
        SandboxState::Ended => "ended",
    }
}

/// `forkd kill`
pub(super) async fn kill(context: &Context, args: &Kill) -> Result<u8, Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let ids = if args.ids.is_empty() {
        let list = context
            .interrupt
            .guard(client.sandboxes(args.tag.as_ref()))
            .await?;
        list.into_iter().map(|sandbox| sandbox.id).collect()
    } else {
        args.ids.clone()
    };
    let asked_by_name = !args.ids.is_empty();
    let failures = kill_all(&client, &ids, |id| {
        let _ = output::line(id.as_str());
    })
    .await;
    let mut code = exit::OK;
    for failure in failures {
        // Who asked for all did not ask for this one, and it is gone.
        if asked_by_name || failure.code() != Some(ErrorCode::NotFound) {
            output::failure(&failure);
            code = exit::FAILURE;
        }
    }
    Ok(code)
}

/// Kills sandboxes, tells each that is gone, and gives what failed.
pub(super) async fn kill_all(
    client: &Client,
    ids: &[SandboxId],
    mut gone: impl FnMut(&SandboxId),
) -> Vec<Failure> {
    let mut kills = futures_util::stream::iter(ids)
        .map(|id| async move { (id, client.kill(id).await) })
        .buffer_unordered(KILLS_AT_ONCE);
    let mut failures = Vec::new();
    while let Some((id, outcome)) = kills.next().await {
        match outcome {
            Ok(()) => gone(id),
            Err(failure) => failures.push(failure.during(format!("kill {id}"))),
        }
    }
    failures
}

/// `forkd pause`
pub(super) async fn pause(context: &Context, args: &One) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    context.interrupt.guard(client.pause(&args.id)).await
}

/// `forkd resume`
pub(super) async fn resume(context: &Context, args: &One) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    context.interrupt.guard(client.resume(&args.id)).await
}

/// `forkd branch`
pub(super) async fn branch(context: &Context, args: &Branch) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let mode = match (args.full, args.no_wait) {
        (true, true) => {
            return Err(Failure::new("--full cannot be combined with --no-wait")
                .with_help("a full copy is always waited for; leave one of them out")
                .with_exit(exit::USAGE));
        }
        (true, false) => BranchMode::Full,
        (false, true) => BranchMode::Live,
        (false, false) => BranchMode::Diff,
    };
    let request = BranchSandbox {
        tag: args.tag.clone(),
        mode: Some(mode),
        wait: !args.no_wait,
        ..BranchSandbox::default()
    };
    let snapshot = context
        .interrupt
        .guard(client.branch(&args.id, &request))
        .await?;
    if args.json {
        return output::json(&snapshot);
    }
    if let Some(us) = snapshot.pause_us {
        let paused = human::ms(us as f64 / 1000.0);
        output::say(&format!("{} went on after {paused}", args.id));
    }
    output::line(snapshot.tag.as_str())
}

/// `forkd logs`
pub(super) async fn logs(context: &Context, args: &Logs) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let work = async {
        let body = client.console(&args.id, args.follow).await?;
        each_chunk(body, output::bytes).await
    };
    match context.interrupt.guard(work).await {
        // Ctrl-C is how one stops following.
        Err(failure) if failure.is_interrupt() => Err(Failure::silent(exit::INTERRUPTED)),
        other => other,
    }
}

/// `forkd ping`
pub(super) async fn ping(context: &Context, args: &Ping) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let pong = context.interrupt.guard(client.ping(&args.id)).await?;
    if args.json {
        return output::json(&pong);
    }
    output::line(&format!(
        "{}: agent {} on Linux {}, eval {}, answered in {}",
        args.id,
        pong.agent_version,
        pong.kernel,
        pong.agent_lang,
        human::ms(pong.round_trip_ms)
    ))
}
