//! What every route can reach.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkd_sandbox::Node;
use forkd_wire::error::ErrorCode;
use http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ApiError;
use crate::audit::Audit;
use crate::auth::Access;
use crate::images::Images;
use crate::metrics::Metrics;
use crate::paths::NodePaths;

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
    access: Arc<Access>,
    audit: Arc<Audit>,
    metrics: Metrics,
    branches: Arc<Semaphore>,
    draining: AtomicBool,
}

impl App {
    pub(crate) fn new(node: Node, options: Options) -> Self {
        let inner = Inner {
            node,
            images: Images::new(options.paths.images),
            access: options.access,
            audit: options.audit,
            metrics: Metrics::new(options.branch_concurrency),
            branches: Arc::new(Semaphore::new(options.branch_concurrency)),
            draining: AtomicBool::new(false),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.inner.node
    }

    pub(crate) fn images(&self) -> &Images {
        &self.inner.images
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

/// Carries an operation through even if the caller goes away: hyper drops a request's future when its
/// connection ends, and half a fork helps nobody.
pub(crate) async fn detached<T, F>(operation: F) -> Result<T, ApiError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, ApiError>> + Send + 'static,
{
    match tokio::spawn(operation).await {
        Ok(result) => result,
        Err(failure) => Err(ApiError::new(
            ErrorCode::Internal,
            format!("the operation broke off: {failure}"),
        )),
    }
}
