//! `forkd fork`: sandboxes that stay.

use forkd_daemon::Net;
use forkd_wire::api::sandbox::{
    CreateSandboxes, ForkResult, IoLimit, NetworkMode, NetworkPolicy, SandboxInfo,
};
use forkd_wire::id::SandboxId;
use serde::Serialize;

use super::Context;
use super::sandboxes::kill_all;
use crate::args::Fork;
use crate::client::api::Forked;
use crate::client::{Client, from_body};
use crate::failure::Failure;
use crate::session::Session;
use crate::{human, output};

/// `--json` of `forkd fork`.
#[derive(Debug, Serialize)]
struct Report<'a> {
    sandboxes: Vec<&'a SandboxInfo>,
    failed: Vec<String>,
    template_ms: Option<f64>,
    forked_ms: Option<f64>,
    ready_ms: Option<f64>,
}

/// `forkd fork`
pub(super) async fn run(context: &Context, args: &Fork) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let request = CreateSandboxes {
        partial: args.partial,
        env: args.env.iter().cloned().collect(),
        metadata: args.metadata.iter().cloned().collect(),
        timeout_secs: args
            .timeout
            .map(|timeout| timeout.as_secs_f64().ceil() as u64),
        memory_limit_mib: args.memory_limit_mib,
        cpu_limit_milli: args.cpu_limit_milli,
        pids_limit: args.pids_limit,
        io_limit: io_limit(args),
        network: policy(args),
        ..CreateSandboxes::new(args.tag.clone(), args.n)
    };
    let forked = forked_or_undone(context, client, request).await?;
    let (made, failed) = told_apart(&forked);
    if args.json {
        output::json(&Report {
            sandboxes: made.clone(),
            failed: failed
                .iter()
                .map(|failure| failure.message().to_owned())
                .collect(),
            template_ms: forked.template_ms,
            forked_ms: forked.forked_ms,
            ready_ms: forked.ready_ms,
        })?;
    } else {
        for sandbox in &made {
            output::line(sandbox.id.as_str())?;
        }
        if let Some(ms) = forked.ready_ms {
            output::say(&format!(
                "{} of {} ready in {}",
                made.len(),
                args.n,
                human::ms(ms)
            ));
        }
    }
    for failure in &failed {
        output::failure(failure);
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(
            Failure::new(format!("{} of {} forks failed", failed.len(), args.n))
                .with_help("the others run; kill them with `forkd kill`"),
        )
    }
}

/// The limit on input and output, if one was asked for.
fn io_limit(args: &Fork) -> Option<IoLimit> {
    let bytes = |mib: Option<u64>| mib.map(|mib| mib << 20);
    let limit = IoLimit {
        read_bytes_per_sec: bytes(args.io_read_limit_mib),
        write_bytes_per_sec: bytes(args.io_write_limit_mib),
        read_iops: args.io_read_limit_iops,
        write_iops: args.io_write_limit_iops,
    };
    (!limit.is_unlimited()).then_some(limit)
}

/// What was said of the network; nothing leaves it to the node.
fn policy(args: &Fork) -> Option<NetworkPolicy> {
    let said = args.net.is_some() || !args.allow.is_empty() || !args.deny.is_empty();
    said.then(|| NetworkPolicy {
        mode: match args.net {
            Some(Net::None) => NetworkMode::None,
            Some(Net::Nat) | None => NetworkMode::Nat,
        },
        allow: args.allow.clone(),
        deny: args.deny.clone(),
    })
}

/// Waits for the forks. After a signal they are still waited for, because the daemon carries them
/// through, and then killed.
pub(super) async fn forked_or_undone(
    context: &Context,
    client: Client,
    request: CreateSandboxes,
) -> Result<Forked, Failure> {
    let asking = client.clone();
    let mut work = tokio::spawn(async move { asking.fork(&request).await });
    tokio::select! {
        done = &mut work => return joined(done),
        () = context.interrupt.raised() => (),
    }
    output::say("interrupted: waiting for the forks, to kill them");
    let forked = joined(work.await)?;
    let (made, _) = told_apart(&forked);
    let ids: Vec<SandboxId> = made.into_iter().map(|sandbox| sandbox.id.clone()).collect();
    for failure in kill_all(&client, &ids, |_| ()).await {
        output::failure(&failure);
    }
    Err(Failure::interrupted())
}

fn joined(
    done: Result<Result<Forked, Failure>, tokio::task::JoinError>,
) -> Result<Forked, Failure> {
    done.unwrap_or_else(|error| Err(Failure::caused("the request broke off", &error)))
}

/// The sandboxes, and why there are not more.
pub(super) fn told_apart(forked: &Forked) -> (Vec<&SandboxInfo>, Vec<Failure>) {
    let mut made = Vec::new();
    let mut failed = Vec::new();
    for (index, child) in forked.children.iter().enumerate() {
        match child {
            ForkResult::Sandbox(sandbox) => made.push(sandbox),
            ForkResult::Failed(body) => {
                failed.push(from_body(body.clone()).during(format!("fork {index}")));
            }
        }
    }
    (made, failed)
}
