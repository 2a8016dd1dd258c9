//! The daemon itself and the node as a whole.

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use forkd_engine::Capabilities;
use forkd_sandbox::view::SandboxStatus;
use forkd_wire::api::node::{
    EngineCapabilities, Healthy, Lineage, LineageSandbox, LineageSnapshot, NotEnforced, Readiness,
    ReadinessCheck, Version,
};
use http::{StatusCode, header};

use super::failures::Failures;
use crate::ApiError;
use crate::auth::Caller;
use crate::convert;
use crate::http::extract::Json;
use crate::state::App;

/// The process lives. Needs no token.
#[utoipa::path(get, path = "/healthz", tag = "node", security(()),
    responses((status = 200, body = Healthy)))]
pub(crate) async fn healthz() -> Json<Healthy> {
    Json(Healthy { ok: true })
}

/// Whether sandboxes can be made, and, for callers with a token, what is missing if not.
#[utoipa::path(get, path = "/readyz", tag = "node",
    responses((status = 200, body = Readiness), (status = 503, body = Readiness), Failures))]
pub(crate) async fn readyz(
    State(app): State<App>,
    caller: Option<Extension<Caller>>,
) -> (StatusCode, Json<Readiness>) {
    let store = match app.node().snapshots().await {
        Ok(_) => None,
        Err(error) => Some(error.chain()),
    };
    let draining = app
        .is_draining()
        .then(|| "the daemon is shutting down".to_owned());
    let check = |name: &str, problem: Option<String>| ReadinessCheck {
        name: name.to_owned(),
        ok: problem.is_none(),
        problem,
    };
    let mut checks = vec![check("store", store), check("lifecycle", draining)];
    let ready = checks.iter().all(|check| check.ok);
    // Probes have no token. Whoever has none learns only whether it is ready.
    let (missing, room) = match caller {
        Some(_) => (app.node().missing().await, Some(app.node().room())),
        None => (vec![], None),
    };
    if caller.is_none() {
        checks.clear();
    }
    let not_enforced = missing.into_iter().map(|missing| NotEnforced {
        what: missing.what,
        why: missing.why,
    });
    let readiness = Readiness {
        ready,
        checks,
        not_enforced: not_enforced.collect(),
        room: room.map(convert::room),
    };
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(readiness))
}

/// Counters, gauges and histograms in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "node",
    responses((status = 200, content_type = "text/plain", body = String), Failures))]
pub(crate) async fn metrics(State(app): State<App>) -> Result<Response, ApiError> {
    let snapshots = app.node().snapshots().await?;
    let node = app.node();
    let text = app
        .metrics()
        .render(&node.sandboxes(), &snapshots, &node.room());
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// The daemon's version and engine, and what that can do.
#[utoipa::path(get, path = "/version", tag = "node",
    responses((status = 200, body = Version), Failures))]
pub(crate) async fn version(State(app): State<App>) -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: "v1".to_owned(),
        engine: app.node().engine().to_owned(),
        capabilities: Some(capabilities(app.node().capabilities())),
    })
}

fn capabilities(can: Capabilities) -> EngineCapabilities {
    EngineCapabilities {
        branch: can.branch,
        branch_writes_behind: can.branch_writes_behind,
        save_layer: can.save_layer,
        network: can.network,
        keeps_connections: can.keeps_connections,
    }
}

/// Which snapshot came from which sandbox, and which sandbox from which snapshot.
#[utoipa::path(get, path = "/v1/lineage", tag = "node",
    responses((status = 200, body = Lineage), Failures))]
pub(crate) async fn lineage(State(app): State<App>) -> Result<Json<Lineage>, ApiError> {
    let snapshots = app.node().snapshots().await?;
    let sandboxes = app.node().sandboxes();
    Ok(Json(Lineage {
        snapshots: snapshots
            .into_iter()
            .map(|view| LineageSnapshot {
                tag: view.tag,
                parent_tag: view.parent,
                branched_from: view.branched_from.map(Into::into),
            })
            .collect(),
        sandboxes: sandboxes
            .into_iter()
            .filter(|view| view.status != SandboxStatus::Ended)
            .map(|view| LineageSandbox {
                id: view.id,
                snapshot_tag: view.tag,
                state: convert::sandbox_state(view.status),
            })
            .collect(),
    }))
}
