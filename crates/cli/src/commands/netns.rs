//! `forkd netns`: network slots made ahead of any node, and the removal of all that are left.

use std::net::Ipv4Addr;
use std::path::Path;

use forkd_slot::provision::{self, Setup, Teardown};
use forkd_slot::slot::User;
use forkd_slot::sweep::{Error, Fate, Keeper};
use forkd_slot::{address, registry};
use serde::Serialize;

use super::Context;
use crate::args::{NetnsCommand, NetnsSetup, NetnsTeardown};
use crate::failure::Failure;
use crate::output;
use crate::progress::Steps;

/// `--json` of `forkd netns setup`.
#[derive(Debug, Serialize)]
struct SetupReport {
    ready: usize,
    made: usize,
    slots: Vec<SlotReport>,
}

#[derive(Debug, Serialize)]
struct SlotReport {
    index: u32,
    netns: String,
    tap: &'static str,
    guest: Ipv4Addr,
    gateway: Ipv4Addr,
    /// What the host sees of it.
    outer: Ipv4Addr,
}

/// `--json` of `forkd netns teardown`.
#[derive(Debug, Serialize)]
struct TeardownReport {
    dry_run: bool,
    removed: Vec<String>,
    kept: Vec<KeptReport>,
    host_rules_removed: bool,
}

#[derive(Debug, Serialize)]
struct KeptReport {
    netns: String,
    reason: String,
}

/// `forkd netns`
pub(super) async fn run(context: &Context, command: NetnsCommand) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            Failure::new("network namespaces of the host belong to root")
                .with_help("run it again as root, for example with sudo"),
        );
    }
    match command {
        NetnsCommand::Setup(args) => setup(context, &args).await,
        NetnsCommand::Teardown(args) => teardown(context, &args).await,
    }
}

async fn setup(context: &Context, args: &NetnsSetup) -> Result<(), Failure> {
    let (count, interrupt) = (args.count, context.interrupt.clone());
    let step = Steps::new(args.json).begin("make network slots");
    let (done, step) = blocking(move || {
        let told = |ready: usize| {
            step.detail(&format!("{ready} of {count}"));
            !interrupt.is_raised()
        };
        let done = provision::setup(Path::new(registry::DIRECTORY), count, told);
        (done, step)
    })
    .await?;
    let done = match done {
        Ok(Some(done)) => done,
        Ok(None) => {
            step.failed();
            return Err(Failure::interrupted());
        }
        Err(error) => {
            step.failed();
            return Err(failure("cannot make network slots", &error));
        }
    };
    step.done(&format!(
        "{} ready, {} made",
        done.ready.len(),
        done.made.len()
    ));
    if let Some(note) = few_neighbours(args.count) {
        output::say(&note);
    }
    if args.json {
        return output::json(&setup_report(&done));
    }
    Ok(())
}

/// What to say of a host that has slots for more guests than it may know the hardware addresses of. Only the host's own
/// namespace has the limit; it counts for all.
fn few_neighbours(slots: u32) -> Option<String> {
    let limit = |version: &str| -> Option<(String, u32)> {
        let setting = format!("net.{version}.neigh.default.gc_thresh3");
        let path = format!("/proc/sys/{}", setting.replace('.', "/"));
        let limit = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
        (limit < slots).then_some((setting, limit))
    };
    let few: Vec<_> = ["ipv4", "ipv6"].into_iter().filter_map(limit).collect();
    let (_, fewest) = few.iter().min_by_key(|(_, limit)| *limit)?;
    let raised: Vec<String> = few
        .iter()
        .map(|(setting, _)| format!("{setting}=16384"))
        .collect();
    Some(format!(
        "note: when more than about {fewest} guests use their networks within seconds, this host loses packets; raise its limit \
         of neighbours: sysctl -w {}",
        raised.join(" ")
    ))
}

async fn teardown(context: &Context, args: &NetnsTeardown) -> Result<(), Failure> {
    let (pretend, interrupt) = (args.dry_run, context.interrupt.clone());
    let step = Steps::new(args.json).begin(match pretend {
        true => "look at network slots",
        false => "remove network slots",
    });
    let (done, step) = blocking(move || {
        let told = |index: u32, _: &Fate| {
            step.detail(&address::netns(index));
            !interrupt.is_raised()
        };
        let done = provision::teardown(Path::new(registry::DIRECTORY), pretend, told);
        (done, step)
    })
    .await?;
    let done = match done {
        Ok(done) => done,
        Err(error) => {
            step.failed();
            return Err(failure("cannot remove network slots", &error));
        }
    };
    let report = teardown_report(&done, pretend);
    let (removed, kept) = (report.removed.len(), report.kept.len());
    let word = if pretend { "would go" } else { "removed" };
    step.done(&format!("{removed} {word}, {kept} kept"));
    if context.interrupt.is_raised() {
        return Err(Failure::new(format!(
            "interrupted; {removed} network slots are gone, others may be left"
        ))
        .with_exit(crate::failure::exit::INTERRUPTED)
        .with_help("run it again to remove the others"));
    }
    if args.json {
        return output::json(&report);
    }
    for kept in &report.kept {
        output::line(&format!("{} kept: {}", kept.netns, kept.reason))?;
    }
    if pretend {
        for netns in &report.removed {
            output::line(&format!("{netns} would be removed"))?;
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::caused("a thread failed", &error))
}

fn failure(what: &str, error: &Error) -> Failure {
    Failure::caused(what, error)
        .with_help("`forkd doctor` tells what this host lacks; nothing was left half made")
}

fn setup_report(done: &Setup) -> SetupReport {
    let slot = |index: &u32| SlotReport {
        index: *index,
        netns: address::netns(*index),
        tap: address::TAP,
        guest: address::GUEST,
        gateway: address::GATEWAY,
        outer: address::outer(*index),
    };
    SetupReport {
        ready: done.ready.len(),
        made: done.made.len(),
        slots: done.ready.iter().map(slot).collect(),
    }
}

fn teardown_report(done: &Teardown, dry_run: bool) -> TeardownReport {
    let mut report = TeardownReport {
        dry_run,
        removed: vec![],
        kept: vec![],
        host_rules_removed: done.rules,
    };
    for (index, fate) in &done.slots {
        let netns = address::netns(*index);
        match fate {
            Fate::Removed => report.removed.push(netns),
            Fate::Kept(keeper) => report.kept.push(KeptReport {
                netns,
                reason: reason(keeper),
            }),
        }
    }
    report
}

fn reason(keeper: &Keeper) -> String {
    match keeper {
        Keeper::Node(state) => format!("the node of {state} is running; it removes its own"),
        Keeper::User(User::Process(pid)) => format!("process {pid} runs in it; end that first"),
        Keeper::User(User::Device) => format!(
            "a process holds its {}; end that first, or start the daemon that left it",
            address::TAP
        ),
    }
}
