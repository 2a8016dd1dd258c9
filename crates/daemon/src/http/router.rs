//! Puts the routes together.

use std::sync::LazyLock;

use axum::extract::DefaultBodyLimit;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Router, middleware};
use forkd_sandbox::Node;
use forkd_wire::error::ErrorCode;
use http::{Method, Uri, header};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes as routes_of;

use crate::ApiError;
use crate::http::idempotency::repeatable;
use crate::http::observe::observe;
use crate::openapi;
use crate::routes::{exec, exec_ws, files, node, sandboxes, snapshots, workspaces};
use crate::state::{App, Options};

/// Largest JSON body, bytes: room for a thousand lines of code and an environment.
const JSON_BODY_MAX: usize = 2 * 1024 * 1024;

/// The daemon's whole interface over a node, for a listener or for a caller in the same process.
pub fn router(node: Node, options: Options) -> Router {
    with_app(App::new(node, options))
}

pub(crate) fn with_app(app: App) -> Router {
    let (routes, _document) = routes().split_for_parts();
    let repeatable = middleware::from_fn_with_state(app.clone(), repeatable);
    let observed = middleware::from_fn_with_state(app.clone(), observe);
    routes
        .route("/healthz/", get(node::healthz))
        .route("/openapi.json", get(openapi_json))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(JSON_BODY_MAX))
        .layer(repeatable)
        .layer(observed)
        .with_state(app)
}

/// Every documented route.
pub(crate) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes_of!(node::healthz))
        .routes(routes_of!(node::readyz))
        .routes(routes_of!(node::version))
        .routes(routes_of!(node::metrics))
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
        .routes(routes_of!(sandboxes::network))
        .routes(routes_of!(sandboxes::branch))
        .routes(routes_of!(exec::ping))
        .routes(routes_of!(exec::exec))
        .routes(routes_of!(exec::stream))
        .routes(routes_of!(exec_ws::websocket))
        .routes(routes_of!(exec::eval))
        .routes(routes_of!(exec::processes, exec::start))
        .routes(routes_of!(exec::follow))
        .routes(routes_of!(exec::signal))
        .routes(routes_of!(files::read, files::write, files::remove))
        .routes(routes_of!(files::list))
        .routes(routes_of!(files::stat))
        .routes(routes_of!(files::mkdir))
        .routes(routes_of!(files::rename))
        .routes(routes_of!(files::console))
        .routes(routes_of!(workspaces::list, workspaces::create))
        .routes(routes_of!(workspaces::get, workspaces::remove))
        .routes(routes_of!(workspaces::suspend))
        .routes(routes_of!(workspaces::resume))
}

/// The description of the interface, made once.
async fn openapi_json() -> impl IntoResponse {
    static DOCUMENT: LazyLock<String> = LazyLock::new(openapi::document_json);
    (
        [(header::CONTENT_TYPE, "application/json")],
        DOCUMENT.as_str(),
    )
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
