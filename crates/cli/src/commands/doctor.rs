//! `forkd doctor`

use serde::Serialize;

use super::{Context, quickstart};
use crate::args::Doctor;
use crate::client::Client;
use crate::doctor::{Check, Daemon, Findings, Status, judge};
use crate::failure::{Failure, exit};
use crate::output;
use crate::session::{DEFAULT_URL, NO_DAEMON};

/// `--json` of `forkd doctor`.
#[derive(Debug, Serialize)]
struct Report {
    ok: usize,
    warn: usize,
    fail: usize,
    checks: Vec<Check>,
}

/// `forkd doctor`
pub(super) async fn run(context: &Context, args: &Doctor) -> Result<u8, Failure> {
    let paths = context.common.paths();
    let engine = args.engine.engine;
    let work =
        tokio::task::spawn_blocking(move || Findings::gather(engine, &paths, quickstart::PACKAGE));
    let gathered = async {
        work.await
            .map_err(|error| Failure::caused("looking at this host broke off", &error))
    };
    let mut found = context.interrupt.guard(gathered).await?;
    found.daemon = daemon(context).await?;
    let checks = judge(&found);
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    let (ok, warn, fail) = (count(Status::Ok), count(Status::Warn), count(Status::Fail));
    if args.json {
        output::json(&Report {
            ok,
            warn,
            fail,
            checks,
        })?;
    } else {
        for check in &checks {
            output::line(&check.line())?;
        }
        output::line(&format!("{ok} ok, {warn} warnings, {fail} failures"))?;
    }
    Ok(if fail == 0 { exit::OK } else { exit::FAILURE })
}

async fn daemon(context: &Context) -> Result<Daemon, Failure> {
    let named = context
        .common
        .daemon_url
        .as_deref()
        .filter(|url| !url.trim().is_empty());
    if named == Some(NO_DAEMON) {
        return Ok(Daemon::NotAsked);
    }
    let url = named.unwrap_or(DEFAULT_URL);
    let client = Client::web(url, context.common.daemon_token.as_deref())?;
    if !client.answers().await {
        return Ok(match named {
            Some(url) => Daemon::Refuses(format!("none answers at {url}")),
            None => Daemon::Absent,
        });
    }
    Ok(match client.version().await {
        Ok(version) => Daemon::Answers {
            version: version.version,
            engine: version.engine,
        },
        Err(failure) => Daemon::Refuses(failure.message().to_owned()),
    })
}
