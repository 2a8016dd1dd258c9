//! `snapshot`, `images`, `snapshot-info`, `rmi`.

use forkd_daemon::EngineArgs;
use forkd_wire::api::sandbox::{BranchMode, BranchSandbox};
use forkd_wire::api::snapshot::{
    CreateSnapshot, SnapshotInfo as Info, SnapshotInfoDetail, SnapshotState, SnapshotStep,
};
use forkd_wire::id::{SandboxId, Tag};

use super::Context;
use crate::args::{Images, RemoveSnapshot, Snapshot, SnapshotInfo};
use crate::client::Client;
use crate::failure::{Failure, exit};
use crate::progress::{Running, Steps};
use crate::session::{self, Session};
use crate::table::Table;
use crate::{human, output};

/// `forkd snapshot`
pub(super) async fn create(context: &Context, args: &Snapshot) -> Result<(), Failure> {
    let made = match (&args.from_sandbox, &args.image, &args.tag) {
        (Some(id), _, tag) => from_sandbox(context, args, id, tag.clone()).await?,
        (None, Some(image), Some(tag)) => from_image(context, args, image, tag.clone()).await?,
        _ => {
            return Err(
                Failure::new("a snapshot needs --tag and --image, or --from-sandbox")
                    .with_exit(exit::USAGE),
            );
        }
    };
    if args.json {
        return output::json(&made);
    }
    output::line(made.tag.as_str())
}

async fn from_sandbox(
    context: &Context,
    args: &Snapshot,
    id: &SandboxId,
    tag: Option<Tag>,
) -> Result<Info, Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let mode = if args.full {
        BranchMode::Full
    } else {
        BranchMode::Diff
    };
    let request = BranchSandbox {
        tag,
        mode: Some(mode),
        ..BranchSandbox::default()
    };
    context.interrupt.guard(client.branch(id, &request)).await
}

async fn from_image(
    context: &Context,
    args: &Snapshot,
    image: &str,
    tag: Tag,
) -> Result<Info, Failure> {
    let request = CreateSnapshot {
        memory_mib: args.memory,
        vcpus: args.vcpus,
        warm: args.warm.clone(),
        warm_cmd: args.warm_cmd.clone(),
        ..CreateSnapshot::of_image(tag, image)
    };
    let session = Session::any(&context.common, &args.engine).await?;
    let embedded = session.is_embedded();
    let steps = Steps::new(false);
    let work = |client: Client| {
        let request = request.clone();
        async move { make(&client, &request, &steps).await }
    };
    match session::run(session, &context.interrupt, work).await {
        Err(failure) if failure.is_interrupt() && !embedded => {
            let tag = &request.tag;
            Err(
                Failure::new(format!("interrupted; the daemon goes on making `{tag}`"))
                    .with_help(format!("remove it when it is there: forkd rmi {tag}"))
                    .with_exit(exit::INTERRUPTED),
            )
        }
        other => other,
    }
}

/// Makes a snapshot and shows its steps.
pub(super) async fn make(
    client: &Client,
    request: &CreateSnapshot,
    steps: &Steps,
) -> Result<Info, Failure> {
    let mut running: Option<Running> = None;
    let made = client
        .create_snapshot(request, |step| {
            if let Some(done) = running.take() {
                done.done("");
            }
            running = Some(steps.begin(step_name(step, request)));
        })
        .await;
    if let Some(last) = running {
        match &made {
            Ok(_) => last.done(""),
            Err(_) => last.failed(),
        }
    }
    made
}

fn step_name(step: SnapshotStep, request: &CreateSnapshot) -> String {
    match step {
        SnapshotStep::Booting => format!(
            "boot the parent ({} MiB, {})",
            request.memory_mib,
            if request.vcpus == 1 {
                "1 vCPU".to_owned()
            } else {
                format!("{} vCPUs", request.vcpus)
            }
        ),
        SnapshotStep::Warming => match request.warm.as_ref().or(request.warm_cmd.as_ref()) {
            Some(what) => format!("warm it: {}", first_line(what)),
            None => "start its interpreter".to_owned(),
        },
        SnapshotStep::Saving => "freeze it".to_owned(),
        SnapshotStep::Publishing => format!("publish the snapshot `{}`", request.tag),
    }
}

fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.len() < text.len() || line.chars().count() > 60 {
        line.chars().take(60).chain(['…']).collect()
    } else {
        line.to_owned()
    }
}

/// `forkd images`
pub(super) async fn list(context: &Context, args: &Images) -> Result<(), Failure> {
    let session = Session::any(&context.common, &EngineArgs::default()).await?;
    let list = session::run(session, &context.interrupt, |client| async move {
        client.snapshots().await
    });
    let mut list = list.await?;
    list.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.created_at_unix));
    if args.json {
        return output::json(&list);
    }
    output::data(&table(&list, human::now_unix()).render())?;
    for broken in list
        .iter()
        .filter(|snapshot| snapshot.status == SnapshotState::Failed)
    {
        let why = broken.warning.as_deref().unwrap_or("unknown reason");
        let tag = &broken.tag;
        output::say(&match broken.bootable {
            true => {
                format!("warning: {tag} is in memory only until there is space to write it: {why}")
            }
            false => format!("warning: {tag} cannot be forked: {why}"),
        });
    }
    Ok(())
}

/// The table of `forkd images`.
pub(crate) fn table(list: &[Info], now: u64) -> Table {
    let columns = [
        "TAG", "STATUS", ">AGE", ">DISK", ">MEMORY", ">VCPUS", "ENGINE", "IMAGE", "PARENT",
    ];
    let mut table = Table::new(&columns);
    for snapshot in list {
        table.row([
            snapshot.tag.to_string(),
            status(snapshot.status).to_owned(),
            human::age(now.saturating_sub(snapshot.created_at_unix)),
            human::bytes(snapshot.physical_bytes),
            human::bytes(snapshot.memory_mib.saturating_mul(1 << 20)),
            snapshot.vcpus.to_string(),
            snapshot.engine.clone(),
            snapshot.image.clone(),
            snapshot
                .parent_tag
                .as_ref()
                .map_or_else(|| "-".to_owned(), Tag::to_string),
        ]);
    }
    table
}

fn status(state: SnapshotState) -> &'static str {
    match state {
        SnapshotState::Writing => "writing",
        SnapshotState::Ready => "ready",
        SnapshotState::Failed => "failed",
    }
}

/// `forkd snapshot-info`
pub(super) async fn info(context: &Context, args: &SnapshotInfo) -> Result<(), Failure> {
    let session = Session::any(&context.common, &EngineArgs::default()).await?;
    let tag = args.tag.clone();
    let work = |client: Client| async move { client.snapshot_info(&tag).await };
    let detail = session::run(session, &context.interrupt, work).await?;
    if args.json {
        return output::json(&detail);
    }
    output::data(&describe(&detail))
}

fn describe(detail: &SnapshotInfoDetail) -> String {
    let names = |tags: &[Tag]| join(tags.iter().map(Tag::as_str));
    let snapshot = &detail.snapshot;
    let rows = [
        ("tag", detail.tag.to_string()),
        ("id", snapshot.id.clone()),
        ("status", status(snapshot.status).to_owned()),
        ("engine", snapshot.engine.clone()),
        ("image", snapshot.image.clone()),
        (
            "machine",
            format!("{} MiB, {} vCPU", snapshot.memory_mib, snapshot.vcpus),
        ),
        ("memory on disk", human::bytes(detail.memory_physical_bytes)),
        ("device state", human::bytes(detail.vmstate_bytes)),
        ("directory", detail.dir.clone()),
        ("ancestors", names(&detail.ancestors)),
        ("dependents", names(&detail.dependents)),
        (
            "sandboxes",
            join(detail.sandboxes.iter().map(SandboxId::as_str)),
        ),
        (
            "branched from",
            snapshot
                .branched_from
                .clone()
                .unwrap_or_else(|| "-".to_owned()),
        ),
        (
            "problem",
            snapshot.warning.clone().unwrap_or_else(|| "-".to_owned()),
        ),
    ];
    rows.iter()
        .map(|(name, value)| format!("{name:<16}{value}\n"))
        .collect()
}

fn join<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        "-".to_owned()
    } else {
        names.join(", ")
    }
}

/// `forkd rmi`
pub(super) async fn remove(context: &Context, args: &RemoveSnapshot) -> Result<(), Failure> {
    let session = Session::any(&context.common, &EngineArgs::default()).await?;
    let (tags, cascade) = (args.tags.clone(), args.cascade);
    session::run(session, &context.interrupt, |client| async move {
        for tag in &tags {
            client.remove_snapshot(tag, cascade).await?;
            output::line(tag.as_str())?;
        }
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_warm_ups_are_shortened() {
        assert_eq!(first_line("import numpy"), "import numpy");
        assert_eq!(first_line("a\nb"), "a…");
        assert_eq!(first_line(&"x".repeat(100)).chars().count(), 61);
    }
}
