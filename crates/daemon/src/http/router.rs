//! Puts the routes together.

use axum::Router;
use forkd_sandbox::Node;
use forkd_wire::error::ErrorCode;
use http::{Method, Uri};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes as routes_of;

use crate::ApiError;
use crate::routes::{node, sandboxes, snapshots};
use crate::state::{App, Options};

/// The daemon's whole interface over a node, for a listener or for a caller in the same process.
pub fn router(node: Node, options: Options) -> Router {
    let app = App::new(node, options);
    let (routes, _document) = routes().split_for_parts();
    routes
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .with_state(app)
}

/// Every documented route.
pub(crate) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes_of!(node::healthz))
        .routes(routes_of!(node::readyz))
        .routes(routes_of!(node::version))
        .routes(routes_of!(node::lineage))
        .routes(routes_of!(snapshots::list, snapshots::create))
        .routes(routes_of!(snapshots::remove))
        .routes(routes_of!(snapshots::info))
        .routes(routes_of!(snapshots::compact))
        .routes(routes_of!(sandboxes::list, sandboxes::create))
        .routes(routes_of!(sandboxes::get, sandboxes::kill))
        .routes(routes_of!(sandboxes::pause))
        .routes(routes_of!(sandboxes::resume))
        .routes(routes_of!(sandboxes::memory))
        .routes(routes_of!(sandboxes::branch))
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("there is no route {}", uri.path()),
    )
    .remedy("GET /openapi.json lists every route")
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let text = format!("{} does not know the method {method}", uri.path());
    ApiError::new(ErrorCode::MethodNotAllowed, text)
}
