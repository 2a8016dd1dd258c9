//! The node within this process: the one a daemon would open, for the time of one command.

use axum::Router;
use forkd_daemon::{EngineArgs, Error, NodePaths, Options};
use forkd_engine::Lifetime;
use forkd_sandbox::view::{Close, Recovery};
use forkd_sandbox::{Admission, Node};

use crate::failure::{Failure, chain};

/// An open node.
#[derive(Debug)]
pub(crate) struct Opened {
    node: Node,
    recovery: Recovery,
    paths: NodePaths,
}

/// Opens the node. Its sandboxes end with this process, however it ends.
pub(crate) async fn open(paths: &NodePaths, args: &EngineArgs) -> Result<Opened, Failure> {
    let engine = forkd_daemon::select_engine(args).map_err(|error| no_engine(&error))?;
    let opened = forkd_daemon::open_node(
        paths,
        engine,
        Lifetime::DieWithParent,
        args.isolation(),
        Admission::default(),
    )
    .await;
    let (node, recovery) = opened.map_err(not_opened)?;
    Ok(Opened {
        node,
        recovery,
        paths: paths.clone(),
    })
}

impl Opened {
    /// The daemon's interface over this node.
    pub(crate) fn router(&self) -> Router {
        forkd_daemon::router(self.node.clone(), Options::embedded(self.paths.clone()))
    }

    /// What was found and put in order when the node was opened.
    pub(crate) fn notes(&self) -> Vec<String> {
        let recovery = &self.recovery;
        let lost = recovery
            .lost
            .iter()
            .map(|(id, why)| format!("sandbox {id} is gone: {why}"));
        let swept = recovery
            .swept
            .iter()
            .map(|what| format!("removed what was left behind: {what}"));
        lost.chain(swept).collect()
    }

    /// Ends the node and everything that runs on it.
    pub(crate) async fn close(self) {
        self.node.close(Close::KillAll).await;
    }
}

fn no_engine(error: &forkd_engine::Error) -> Failure {
    Failure::caused("no engine can be used", error)
        .with_help("`forkd doctor` shows what this host lacks and what to install")
}

fn not_opened(error: Error) -> Failure {
    match error {
        // Says itself what would help; of a node that is in use, also by which process.
        Error::Node(error) => Failure::from(error),
        Error::Directory { .. } => Failure::new(chain(&error))
            .with_help("run as root, or name a directory of your own with --data-dir"),
        other => Failure::new(chain(&other)),
    }
}
