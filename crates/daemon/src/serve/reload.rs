//! What arrives while the daemon runs: signals, and files that have changed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::http::error::chain;
use crate::state::App;
use crate::tls::Tls;

/// How often files are looked at. A mounted secret is replaced by a rename of a directory, which watching
/// the file itself would miss.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The signals that end the daemon.
#[derive(Debug)]
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next one, and names it.
    pub(super) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Reads tokens and certificates again when they change, and reopens the audit log on SIGHUP.
pub(super) async fn watch(app: App, tls: Option<Arc<Tls>>, tokens: Option<PathBuf>) {
    let mut hangup = match signal(SignalKind::hangup()) {
        Ok(hangup) => hangup,
        Err(error) => {
            tracing::error!(error = %error, "cannot receive SIGHUP; nothing is reloaded");
            return;
        }
    };
    let mut seen = stamps(tls.as_deref(), tokens.as_ref()).await;
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            () = tokio::time::sleep(LOOK_EVERY) => false,
        };
        let now = stamps(tls.as_deref(), tokens.as_ref()).await;
        if asked && let Err(error) = app.audit().reopen() {
            tracing::error!(error = chain(&error), "audit log not reopened");
        }
        if asked || now != seen {
            reload(&app, tls.as_deref());
        }
        seen = now;
    }
}

fn reload(app: &App, tls: Option<&Tls>) {
    match app.access().reload() {
        Ok(true) => tracing::info!("tokens reloaded"),
        Ok(false) => {}
        Err(error) => {
            tracing::error!(
                error = chain(&error),
                "tokens not reloaded, the old ones stay in force"
            );
        }
    }
    if let Some(tls) = tls {
        match tls.reload() {
            Ok(()) => tracing::info!("certificate reloaded"),
            Err(error) => tracing::error!(
                error = chain(&error),
                "certificate not reloaded, the old one stays in force"
            ),
        }
    }
}

type Stamp = Option<(SystemTime, u64)>;

async fn stamps(tls: Option<&Tls>, tokens: Option<&PathBuf>) -> Vec<(PathBuf, Stamp)> {
    let mut paths: Vec<PathBuf> = tls.map_or(vec![], |tls| tls.files().map(Into::into).to_vec());
    if let Some(tokens) = tokens {
        paths.push(tokens.clone());
        if let Ok(mut entries) = tokio::fs::read_dir(tokens).await {
            while let Ok(Some(entry)) = entries.next_entry().await {
                paths.push(entry.path());
            }
        }
    }
    paths.sort();
    let mut stamps = Vec::new();
    for path in paths {
        let meta = tokio::fs::metadata(&path).await.ok();
        let stamp = meta.and_then(|meta| Some((meta.modified().ok()?, meta.len())));
        stamps.push((path, stamp));
    }
    stamps
}
