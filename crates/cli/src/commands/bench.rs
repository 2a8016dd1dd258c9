//! `forkd bench`: every stage of a sandbox's life, measured on this node.
//!
//! ```text
//!   single forks ─► fan-out of N ─► idle ─► first exec ─► more execs ─► first eval ─► kill
//!   (one by one)    (all at once)   memory, CPU           CPU           memory
//! ```
//!
//! After the fan-out, stages run one sandbox after the other, so that each figure is a latency and not a
//! share of a crowded host.

use forkd_wire::id::SandboxId;

use super::sandboxes::kill_all;
use super::{Context, fork};
use crate::args::Bench;
use crate::failure::Failure;
use crate::progress::Steps;
use crate::session::Session;
use crate::{human, output};

mod cpu;
mod html;
mod measure;
mod plot;
mod report;

use measure::Bencher;
use report::Report;

/// `forkd bench`
pub(super) async fn run(context: &Context, args: &Bench) -> Result<(), Failure> {
    let session = Session::any(&context.common, &args.engine).await?;
    let bencher = Bencher::new(session.client.clone(), args, Steps::new(false));
    let outcome = measured(context, &bencher).await;
    session.close().await;
    let report = outcome?;
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&report)).map_err(|error| {
            Failure::caused(format!("cannot write {}", path.display()), &error)
                .with_help("name a file in a directory that exists and that you may write to")
        })?;
        output::say(&format!("wrote {}", path.display()));
    }
    if args.json {
        output::json(&report)
    } else {
        output::data(&report.text())
    }
}

/// Measures; whatever happens, no sandbox of ours is left.
async fn measured(context: &Context, bencher: &Bencher) -> Result<Report, Failure> {
    let mut report = context.interrupt.guard(bencher.prepare()).await?;
    for _ in 0..measure::SINGLES {
        let forked = fork::forked_or_undone(context, bencher.client(), bencher.request(1)).await?;
        let ids = ids(&forked);
        bencher.note_single(&mut report, &forked);
        undo(bencher, &ids).await?;
        if context.interrupt.is_raised() {
            return Err(Failure::interrupted());
        }
    }
    let step = bencher
        .steps()
        .begin(format!("fork {} sandboxes at once", report.n));
    let began = std::time::Instant::now();
    let request = bencher.request(report.n);
    let forked = fork::forked_or_undone(context, bencher.client(), request).await?;
    let wall_ms = began.elapsed().as_secs_f64() * 1000.0;
    step.done(&format!("all answered in {}", human::ms(wall_ms)));
    let ids = ids(&forked);
    bencher.note_fan_out(&mut report, &forked, wall_ms);
    let stages = context
        .interrupt
        .guard(bencher.stages(&mut report, &forked))
        .await;
    match stages {
        Ok(()) => bencher.kill(&mut report, &ids).await?,
        Err(failure) => {
            undo(bencher, &ids).await?;
            return Err(failure);
        }
    }
    report.conclude();
    Ok(report)
}

fn ids(forked: &crate::client::api::Forked) -> Vec<SandboxId> {
    let (made, _) = fork::told_apart(forked);
    made.into_iter().map(|sandbox| sandbox.id.clone()).collect()
}

async fn undo(bencher: &Bencher, ids: &[SandboxId]) -> Result<(), Failure> {
    let failures = kill_all(&bencher.client(), ids, |_| ()).await;
    failures.into_iter().next().map_or(Ok(()), Err)
}
