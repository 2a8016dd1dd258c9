//! What every route can reach.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkd_sandbox::Node;
use forkd_sandbox::guest::Client;
use forkd_sandbox::view::{Ending, SandboxStatus, SandboxView};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ApiError;
use crate::audit::Audit;
use crate::auth::Access;
use crate::http::idempotency::UnderWay;
use crate::images::Images;
use crate::metrics::Metrics;
use crate::paths::NodePaths;
use crate::workspaces::Workspaces;

/// Branches made at once, unless said otherwise: each may write as much as a guest's memory.
pub(crate) const BRANCH_CONCURRENCY: usize = 4;

/// How a router behaves beyond the node it serves.
#[derive(Debug)]
pub struct Options {
    /// Where the node keeps things.
    pub paths: NodePaths,
    /// Who may use it.
    pub access: Arc<Access>,
    /// What is written down about requests.
    pub audit: Arc<Audit>,
    /// Branches that may be made at once.
    pub branch_concurrency: usize,
}

impl Options {
    /// For a router inside one process: no tokens, no audit log.
    pub fn embedded(paths: NodePaths) -> Self {
        Self {
            paths,
            access: Arc::new(Access::open()),
            audit: Arc::new(Audit::off()),
            branch_concurrency: BRANCH_CONCURRENCY,
        }
    }
}

/// The shared state of all routes. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct App {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: Node,
    images: Images,
    workspaces: Workspaces,
    access: Arc<Access>,
    audit: Arc<Audit>,
    metrics: Metrics,
    branches: Arc<Semaphore>,
    under_way: UnderWay,
    draining: AtomicBool,
}

impl App {
    pub(crate) fn new(node: Node, options: Options) -> Self {
        let inner = Inner {
            workspaces: Workspaces::new(node.clone(), options.paths.workspaces()),
            node,
            images: Images::new(options.paths.images),
            access: options.access,
            audit: options.audit,
            metrics: Metrics::new(options.branch_concurrency),
            branches: Arc::new(Semaphore::new(options.branch_concurrency)),
            under_way: UnderWay::default(),
            draining: AtomicBool::new(false),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.inner.node
    }

    /// A sandbox this node knows, running or not. One that was killed on request is gone for its users,
    /// though the node remembers it for a while.
    pub(crate) fn known(&self, id: &SandboxId) -> Result<SandboxView, ApiError> {
        let view = self.node().sandbox(id)?;
        if view.ending == Some(Ending::Killed) && view.status == SandboxStatus::Ended {
            return Err(ApiError::new(
                ErrorCode::NotFound,
                format!("there is no sandbox {id}"),
            ));
        }
        Ok(view)
    }

    /// The agent of a running sandbox.
    pub(crate) fn guest(&self, id: &SandboxId) -> Result<Client, ApiError> {
        self.known(id)?;
        Ok(self.node().guest(id)?)
    }

    pub(crate) fn images(&self) -> &Images {
        &self.inner.images
    }

    pub(crate) fn workspaces(&self) -> &Workspaces {
        &self.inner.workspaces
    }

    pub(crate) fn access(&self) -> &Access {
        &self.inner.access
    }

    pub(crate) fn audit(&self) -> &Audit {
        &self.inner.audit
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    pub(crate) fn under_way(&self) -> &UnderWay {
        &self.inner.under_way
    }

    /// From now on requests are refused.
    pub(crate) fn drain(&self) {
        self.inner.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::Relaxed)
    }

    /// Takes one of the places for branches, or refuses.
    pub(crate) fn branch_place(&self) -> Result<BranchPlace, ApiError> {
        match Arc::clone(&self.inner.branches).try_acquire_owned() {
            Ok(permit) => {
                self.metrics().branches_in_flight.inc();
                Ok(BranchPlace {
                    app: self.clone(),
                    _permit: permit,
                })
            }
            Err(_) => Err(
                ApiError::new(ErrorCode::Busy, "too many branches are being made")
                    .remedy("try again, or raise --branch-concurrency")
                    .status(StatusCode::SERVICE_UNAVAILABLE),
            ),
        }
    }
}

/// One of the places for branches, until it is dropped.
#[derive(Debug)]
pub(crate) struct BranchPlace {
    app: App,
    _permit: OwnedSemaphorePermit,
}

impl Drop for BranchPlace {
    fn drop(&mut self) {
        self.app.metrics().branches_in_flight.dec();
    }
}
