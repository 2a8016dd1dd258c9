//! What every route can reach.

use std::future::Future;
use std::sync::Arc;

use forkd_sandbox::Node;
use forkd_wire::error::ErrorCode;

use crate::ApiError;
use crate::images::Images;
use crate::paths::NodePaths;

/// How a router behaves beyond the node it serves.
#[derive(Debug)]
pub struct Options {
    /// Where the node keeps things.
    pub paths: NodePaths,
}

impl Options {
    /// For a router inside one process: no tokens, no audit log.
    pub fn embedded(paths: NodePaths) -> Self {
        Self { paths }
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
}

impl App {
    pub(crate) fn new(node: Node, options: Options) -> Self {
        let images = Images::new(options.paths.images);
        Self {
            inner: Arc::new(Inner { node, images }),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.inner.node
    }

    pub(crate) fn images(&self) -> &Images {
        &self.inner.images
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
