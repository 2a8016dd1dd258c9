//! `forkd quickstart`: from nothing to N answering sandboxes, and nothing left running.
//!
//! ```text
//!   check host ─► image ─► boot, import numpy, freeze ─► fork N ─► every fork computes ─► kill
//!                (kept)          (kept as `quickstart`)           (checked on the host)
//! ```

use forkd_image::{BuildRequest, Debian, Source};
use forkd_wire::api::exec::Eval;
use forkd_wire::api::sandbox::{CreateSandboxes, SandboxInfo};
use forkd_wire::api::snapshot::{CreateSnapshot, SnapshotInfo, SnapshotState};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::{SandboxId, Tag};
use futures_util::StreamExt;

use super::{Context, fork, image, sandboxes, snapshots};
use crate::args::Quickstart;
use crate::client::Client;
use crate::doctor;
use crate::failure::{Failure, exit};
use crate::progress::Steps;
use crate::session::Session;
use crate::{agent, human, output};

mod memo;
mod report;
mod task;

use memo::Memo;
use report::{Child, Report};

/// The packages of the image, which is named after them.
pub(super) const PACKAGE: &str = "python3-numpy";
/// The snapshot's tag.
const TAG: &str = "quickstart";
/// What the parent runs before it is frozen.
const WARM: &str = "import numpy";
/// Sandboxes asked at the same time.
const ASKED_AT_ONCE: usize = 16;
/// Seconds a sandbox may compute. Software emulation on a loaded machine is slow.
const COMPUTE_SECS: u64 = 60;

/// `forkd quickstart`
pub(super) async fn run(context: &Context, args: &Quickstart) -> Result<u8, Failure> {
    let steps = Steps::new(false);
    check_host(context, args, &steps)?;
    let request = BuildRequest {
        name: Some(PACKAGE.to_owned()),
        ..BuildRequest::new(Source::Debian(Debian::new([PACKAGE])), &agent::find()?)
    };
    let built = image::build(context, request, &steps).await?;
    let digest = built.image.digest.to_string();

    let session = Session::any(&context.common, &args.engine).await?;
    let start = Start {
        client: session.client.clone(),
        memo: Memo::at(&context.common.paths().data),
        steps,
        n: args.n,
        digest,
    };
    let outcome = start.all(context).await;
    session.close().await;
    let report = outcome?;
    if args.json {
        output::json(&report.json())?;
    } else {
        output::data(&report.text())?;
    }
    Ok(if report.is_complete() {
        exit::OK
    } else {
        exit::FAILURE
    })
}

fn check_host(context: &Context, args: &Quickstart, steps: &Steps) -> Result<(), Failure> {
    let step = steps.begin("check this host");
    let needed = doctor::needed(args.engine.engine, &context.common.paths(), PACKAGE);
    let missing: Vec<doctor::Check> = needed
        .into_iter()
        .filter(|check| check.status == doctor::Status::Fail)
        .collect();
    if missing.is_empty() {
        step.done("");
        return Ok(());
    }
    step.failed();
    for check in &missing {
        output::say(&check.line());
    }
    Err(Failure::new(format!(
        "this host lacks {} thing(s) that forkd needs",
        missing.len()
    ))
    .with_help("see above for each; `forkd doctor` shows everything that was checked"))
}

/// Everything the steps need.
#[derive(Debug)]
struct Start {
    client: Client,
    memo: Memo,
    steps: Steps,
    n: u32,
    digest: String,
}

impl Start {
    async fn all(&self, context: &Context) -> Result<Report, Failure> {
        let engine = context.interrupt.guard(self.client.version()).await?.engine;
        let (snapshot, stages, reused) = context.interrupt.guard(self.snapshot()).await?;
        let step = self
            .steps
            .begin(format!("fork {} sandboxes of `{TAG}`", self.n));
        let began = std::time::Instant::now();
        let request = CreateSandboxes {
            partial: true,
            ..CreateSandboxes::new(snapshot.tag, self.n)
        };
        let forked = fork::forked_or_undone(context, self.client.clone(), request).await;
        let forked = match forked {
            Ok(forked) => forked,
            Err(failure) => {
                step.failed();
                return Err(failure);
            }
        };
        let wall_ms = began.elapsed().as_secs_f64() * 1000.0;
        let (made, failed) = fork::told_apart(&forked);
        step.done(&format!("{} ready", made.len()));
        let ids: Vec<SandboxId> = made.iter().map(|sandbox| sandbox.id.clone()).collect();
        let children = context.interrupt.guard(self.compute(&made)).await;
        let step = self.steps.begin("kill them");
        let left = sandboxes::kill_all(&self.client, &ids, |_| ()).await;
        let children = children?;
        if let Some(first) = left.into_iter().next() {
            step.failed();
            return Err(first);
        }
        step.done("");
        for failure in &failed {
            output::failure(failure);
        }
        Ok(Report {
            engine,
            n: self.n,
            stages,
            reused,
            fork_wall_ms: wall_ms,
            children,
        })
    }

    /// The snapshot, made anew unless there is one of the same image and warm-up.
    async fn snapshot(&self) -> Result<(SnapshotInfo, memo::Stages, bool), Failure> {
        let tag = Tag::new(TAG).map_err(|error| Failure::caused("the tag is refused", &error))?;
        match self.client.snapshot_info(&tag).await {
            Ok(detail) => {
                let found = detail.snapshot;
                let stages = self.memo.read(&found.id, &self.digest, WARM);
                let usable = found.status == SnapshotState::Ready && found.bootable;
                if let (true, Some(stages)) = (usable, stages) {
                    let step = self.steps.begin(format!("snapshot `{TAG}`"));
                    step.done("there already, of the same image");
                    return Ok((found, stages, true));
                }
                let step = self
                    .steps
                    .begin(format!("remove the outdated snapshot `{TAG}`"));
                self.client
                    .remove_snapshot(&tag, false)
                    .await
                    .map_err(|failure| {
                        failure.during(format!(
                            "the snapshot `{TAG}` is outdated and cannot be removed"
                        ))
                    })?;
                step.done("");
            }
            Err(failure) if failure.code() == Some(ErrorCode::NotFound) => (),
            Err(failure) => return Err(failure),
        }
        let request = CreateSnapshot {
            warm: Some(WARM.to_owned()),
            ..CreateSnapshot::of_image(tag, PACKAGE)
        };
        let made = snapshots::make(&self.client, &request, &self.steps).await?;
        let stages = self.memo.write(&made, &self.digest, WARM)?;
        Ok((made, stages, false))
    }

    /// Lets every sandbox compute its own sum with the interpreter it inherited.
    async fn compute(&self, made: &[&SandboxInfo]) -> Result<Vec<Child>, Failure> {
        let step = self
            .steps
            .begin("let each compute something else with the inherited numpy");
        let mut children: Vec<Child> = futures_util::stream::iter(made)
            .map(|sandbox| self.ask(sandbox))
            .buffer_unordered(ASKED_AT_ONCE)
            .collect()
            .await;
        children.sort_by_key(|child| child.index);
        let right = children.iter().filter(|child| child.is_right()).count();
        step.done(&format!("{right} right"));
        Ok(children)
    }

    async fn ask(&self, sandbox: &SandboxInfo) -> Child {
        let index = sandbox.index;
        let question = Eval {
            code: task::code(index),
            timeout_secs: COMPUTE_SECS,
        };
        let answer = match self.client.eval(&sandbox.id, &question).await {
            Ok(result) => match (result.result, result.error) {
                (_, Some(error)) => Err(error),
                (Some(value), None) => Ok(value),
                (None, None) => Err("no value".to_owned()),
            },
            Err(failure) => Err(failure.message().to_owned()),
        };
        let memory = self.client.memory(&sandbox.id).await.ok();
        Child {
            index,
            id: sandbox.id.to_string(),
            answer,
            ready_ms: sandbox.stages.ready_ms,
            private_kib: memory.map(|memory| memory.private_kib),
        }
    }
}

/// What the summary says about a time that was measured by an earlier run.
fn told(ms: f64, reused: bool) -> String {
    if reused {
        format!("{} (when it was made)", human::ms(ms))
    } else {
        human::ms(ms)
    }
}
