//! The daemon from start to end: settings, node, listener, signals, drain.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use forkd_engine::{Engine, Lifetime};
use forkd_sandbox::spec::NodeConfig;
use forkd_sandbox::view::{Close, Recovery};
use forkd_sandbox::{Admission, Isolation, Node};
use tokio::net::TcpListener;

use crate::args::OnExit;
use crate::audit::{self, Audit};
use crate::auth::{Access, tokens};
use crate::config::Config;
use crate::paths::NodePaths;
use crate::state::{App, Options};
use crate::tls::{self, Tls};
use crate::{engine, http};

mod connections;
mod memory;
mod reload;

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory cannot be made.
    #[error("cannot make the directory {}", .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tokens cannot be used.
    #[error("the tokens cannot be used")]
    Tokens(#[source] tokens::Error),
    /// The audit log cannot be written.
    #[error("requests cannot be written down")]
    Audit(#[source] audit::Error),
    /// TLS cannot be served.
    #[error("TLS cannot be served")]
    Tls(#[source] tls::Error),
    /// No engine.
    #[error("no engine can be used")]
    Engine(#[source] forkd_engine::Error),
    /// The heart refuses to start; it says why and what would help.
    #[error("the node cannot be opened{}", .0.remedy().map(|r| format!(" (remedy: {r})")).unwrap_or_default())]
    Node(#[source] forkd_sandbox::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}; name another with --bind")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[source] io::Error),
}

/// Opens the node of these paths, for the daemon or for one command.
pub async fn open_node(
    paths: &NodePaths,
    engine: Arc<dyn Engine>,
    lifetime: Lifetime,
    isolation: Isolation,
    admission: Admission,
) -> Result<(Node, Recovery), Error> {
    let state_dir = paths.state.parent().unwrap_or(&paths.data);
    for dir in [
        paths.data.as_path(),
        &paths.snapshots,
        &paths.run,
        state_dir,
    ] {
        let made = tokio::fs::create_dir_all(dir).await;
        made.map_err(|source| Error::Directory {
            path: dir.to_owned(),
            source,
        })?;
    }
    let config = NodeConfig {
        snapshot_root: paths.snapshots.clone(),
        state: paths.state.clone(),
        run_dir: paths.run.clone(),
        lifetime,
        isolation: possible(engine.as_ref(), isolation),
        admission,
    };
    Node::open(config, engine).await.map_err(Error::Node)
}

/// An engine that gives its guests no network device runs no machines either: it is one for tests.
fn possible(engine: &dyn Engine, wanted: Isolation) -> Isolation {
    match engine.capabilities().network {
        true => wanted,
        false => Isolation::OFF,
    }
}

/// Runs the daemon until a signal ends it.
pub async fn serve(config: Config) -> Result<(), Error> {
    let engine = engine::select(&config.engine).map_err(Error::Engine)?;
    serve_with(config, engine).await
}

/// Runs the daemon over this engine until a signal ends it.
pub async fn serve_with(config: Config, engine: Arc<dyn Engine>) -> Result<(), Error> {
    // Before anything is read: what changes from then on is read again.
    let watch = reload::Watch::begin(&config)
        .await
        .map_err(Error::Signals)?;
    let audit = match &config.audit_log {
        Some(path) => Audit::to_file(path).map_err(Error::Audit)?,
        None => Audit::off(),
    };
    let access = match &config.token_file {
        Some(path) => Access::from_path(path).map_err(Error::Tokens)?,
        None => Access::open(),
    };
    let tls = match &config.tls {
        Some((cert, key)) => Some(Arc::new(Tls::open(cert, key).map_err(Error::Tls)?)),
        None => None,
    };
    // The address first: whoever is told that it is taken should not have had his state touched.
    let bound = |source| Error::Bind {
        addr: config.bind,
        source,
    };
    let listener = TcpListener::bind(config.bind).await.map_err(bound)?;
    let addr = listener.local_addr().map_err(bound)?;
    let signals = reload::Signals::new().map_err(Error::Signals)?;

    let lifetime = match config.on_exit {
        OnExit::Keep => Lifetime::Survive,
        OnExit::Kill => Lifetime::DieWithParent,
    };
    let (node, recovery) = open_node(
        &config.paths,
        engine,
        lifetime,
        config.isolation.clone(),
        config.admission,
    )
    .await?;
    tracing::info!(?recovery, "node opened");
    let app = App::new(
        node.clone(),
        Options {
            paths: config.paths.clone(),
            access: Arc::new(access),
            audit: Arc::new(audit),
            branch_concurrency: config.branch_concurrency,
        },
    );
    // A record that cannot be read is told to whoever asks for a workspace; the sandboxes are served all the same.
    if let Err(error) = app.workspaces().reconcile().await {
        tracing::error!(error = error.into_body().error, "workspaces not taken over");
    }
    let router = http::router::with_app(app.clone());
    connections::raise_file_limit();
    let serving = connections::Serving {
        app: app.clone(),
        router,
        tls: tls.clone(),
        max: config.max_connections,
    };
    tracing::info!(%addr, tls = tls.is_some(), engine = node.engine(), "serving");
    let watch = tokio::spawn(watch.run(app.clone(), tls));
    let memory = tokio::spawn(memory::run(app));
    connections::serve(listener, serving, signals, config.drain).await;
    watch.abort();
    memory.abort();
    close(&node, config.on_exit).await;
    Ok(())
}

async fn close(node: &Node, on_exit: OnExit) {
    let how = match on_exit {
        OnExit::Keep => Close::Leave,
        OnExit::Kill => Close::KillAll,
    };
    node.close(how).await;
    tracing::info!("ended");
}
