//! What arrives while the daemon runs: signals, and files that have changed.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Config;
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
#[derive(Debug)]
pub(super) struct Watch {
    hangup: Signal,
    certificate: Vec<PathBuf>,
    tokens: Option<PathBuf>,
    seen: Stamps,
}

impl Watch {
    /// From here on SIGHUP does not end the process, and a changed file is noticed.
    pub(super) async fn begin(config: &Config) -> io::Result<Self> {
        let hangup = signal(SignalKind::hangup())?;
        let certificate = config.tls.iter().flat_map(|(cert, key)| [cert, key]);
        let mut watch = Self {
            hangup,
            certificate: certificate.cloned().collect(),
            tokens: config.token_file.clone(),
            seen: Stamps::new(),
        };
        watch.seen = watch.look().await;
        Ok(watch)
    }

    pub(super) async fn run(mut self, app: App, tls: Option<Arc<Tls>>) {
        loop {
            let asked = tokio::select! {
                _ = self.hangup.recv() => true,
                () = tokio::time::sleep(LOOK_EVERY) => false,
            };
            let now = self.look().await;
            if asked && let Err(error) = app.audit().reopen() {
                tracing::error!(error = chain(&error), "audit log not reopened");
            }
            if asked || now != self.seen {
                reload(&app, tls.as_deref());
            }
            self.seen = now;
        }
    }

    async fn look(&self) -> Stamps {
        let mut paths = self.certificate.clone();
        if let Some(tokens) = &self.tokens {
            paths.push(tokens.clone());
            if let Ok(mut entries) = tokio::fs::read_dir(tokens).await {
                while let Ok(Some(entry)) = entries.next_entry().await {
                    paths.push(entry.path());
                }
            }
        }
        paths.sort();
        let mut stamps = Stamps::new();
        for path in paths {
            let meta = tokio::fs::metadata(&path).await.ok();
            stamps.push((path, meta.as_ref().map(Stamp::of)));
        }
        stamps
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

type Stamps = Vec<(PathBuf, Option<Stamp>)>;

/// Tells one content of a file from the next. A file replaced by one of the same age and length is another inode,
/// and one written in place gets another change time.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    changed: (i64, i64),
    bytes: u64,
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            inode: (meta.dev(), meta.ino()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            bytes: meta.len(),
        }
    }
}
