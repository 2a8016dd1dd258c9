//! Around every request: an id, the token, the audit line, the metrics, and an answer even to a panic.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use forkd_wire::api::REQUEST_ID;
use forkd_wire::error::ErrorCode;
use futures_util::FutureExt;
use http::{HeaderValue, header};

use crate::ApiError;
use crate::audit::Entry;
use crate::auth::{self, Caller};
use crate::http::error::Failed;
use crate::state::App;

/// Longest id a client may bring.
const ID_LEN_MAX: usize = 64;

/// The name of routes that do not exist, in the metrics: made-up paths must not become labels.
const NO_ROUTE: &str = "none";

pub(crate) async fn observe(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(&request);
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or(NO_ROUTE, MatchedPath::as_str).to_owned();
    let remote = request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map(|info| info.0);
    let ua = request.headers().get(header::USER_AGENT).cloned();

    let caller = app.access().identify(request.headers());
    let actor = caller.as_ref().ok().map(|caller| caller.name.clone());
    let admitted = admit(&app, &request, &route, caller);
    let mut response = match admitted {
        Ok(caller) => {
            if let Some(caller) = caller {
                request.extensions_mut().insert(caller);
            }
            answer(request, next).await
        }
        Err(refusal) => refusal.into_response(),
    };

    let status = response.status().as_u16();
    let latency = begun.elapsed();
    if let Some(Failed(code)) = response.extensions().get() {
        app.metrics().error(*code);
    }
    app.metrics()
        .request(method.as_str(), &route, status, latency);
    let written = app.audit().write(&Entry {
        request_id: &id,
        actor: actor.as_deref(),
        remote: remote.map(|addr| addr.to_string()),
        method: method.as_str(),
        path: &path,
        status,
        latency,
        ua: ua.as_ref().and_then(|ua| ua.to_str().ok()),
    });
    if let Err(error) = written {
        app.metrics().audit_failures.inc();
        tracing::error!(request = id, error = %error, "audit line not written");
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Who may come in. `None` is somebody unknown on a route that is open to all.
fn admit(
    app: &App,
    request: &Request,
    route: &str,
    caller: Result<Caller, ApiError>,
) -> Result<Option<Caller>, ApiError> {
    let path = request.uri().path();
    if matches!(path, "/healthz" | "/healthz/" | "/readyz") {
        return Ok(caller.ok());
    }
    let caller = caller?;
    let needed = auth::needed(request.method(), route);
    if caller.scope < needed {
        let text = format!(
            "the token {:?} may {}, this needs {needed}",
            caller.name, caller.scope
        );
        return Err(ApiError::new(ErrorCode::Forbidden, text));
    }
    if app.is_draining() {
        return Err(ApiError::new(
            ErrorCode::ShuttingDown,
            "the daemon is shutting down",
        ));
    }
    Ok(Some(caller))
}

async fn answer(request: Request, next: Next) -> Response {
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => ApiError::new(ErrorCode::Internal, "the request hit a bug of the daemon")
            .remedy("the daemon's log has a panic message with the same time")
            .into_response(),
    }
}

fn request_id(request: &Request) -> String {
    let own = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok());
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let usable = |id: &&str| (1..=ID_LEN_MAX).contains(&id.len()) && id.bytes().all(plain);
    if let Some(id) = own.filter(usable) {
        return id.to_owned();
    }
    let id = getrandom::u64().unwrap_or_default();
    format!("{id:016x}")
}
