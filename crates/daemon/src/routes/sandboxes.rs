//! Sandboxes: making, listing, killing, freezing.

use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use forkd_sandbox::record::RequestId;
use forkd_sandbox::spec::{BranchRequest, ForkRequest};
use forkd_sandbox::view::{ForkOutcome, SandboxStatus, SandboxView};
use forkd_wire::api::sandbox::{
    BranchMode, BranchSandbox, CreateSandboxes, ForkResult, ListSandboxes, MemoryUse, NetworkMode,
    NetworkPolicy, PartialSandboxes, SandboxInfo,
};
use forkd_wire::api::snapshot::SnapshotInfo;
use forkd_wire::api::{FORKED_MS, NEXT_PAGE, READY_MS, TEMPLATE_MS};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use http::{HeaderMap, HeaderValue, StatusCode};

use super::failures::Failures;
use crate::ApiError;
use crate::convert;
use crate::http::extract::{Json, OptionalJson, Path, Query};
use crate::state::App;

/// Longest life of a sandbox that may be asked for, seconds: a year.
const TIMEOUT_SECS_MAX: u64 = 365 * 24 * 3600;
/// Longest wait for the guests that may be asked for, seconds.
const READY_SECS_MAX: u64 = 3600;
/// Largest page of a list.
const PAGE_MAX: u32 = 10_000;

/// Forks a snapshot into `n` sandboxes. Answers when every guest has answered.
#[utoipa::path(post, path = "/v1/sandboxes", tag = "sandboxes", request_body = CreateSandboxes,
    responses((status = 201, body = inline(Created), headers(
        ("forkd-template-ms" = f64, description = "Until the template could be forked"),
        ("forkd-forked-ms" = f64, description = "Until the last VM ran"),
        ("forkd-ready-ms" = f64, description = "Until the last guest had answered"))), Failures))]
pub(crate) async fn create(
    State(app): State<App>,
    repeatable: Option<Extension<RequestId>>,
    Json(body): Json<CreateSandboxes>,
) -> Result<Response, ApiError> {
    let mut request = fork_request(&body)?;
    request.repeatable = repeatable.map(|Extension(id)| id);
    let partial = request.partial;
    let outcome = app.node().fork(request).await?;
    app.metrics().fork(&outcome);
    let stages = stage_headers(&outcome);
    let children = outcome.children.into_iter();
    if partial {
        let sandboxes = children.map(|child| match child {
            Ok(view) => ForkResult::Sandbox(convert::sandbox(view)),
            Err(error) => ForkResult::Failed(ApiError::from(error).into_body()),
        });
        let body = PartialSandboxes {
            sandboxes: sandboxes.collect(),
        };
        return Ok((StatusCode::CREATED, stages, Json(body)).into_response());
    }
    let sandboxes: Result<Vec<SandboxView>, _> = children.collect();
    let sandboxes: Vec<SandboxInfo> = sandboxes?.into_iter().map(convert::sandbox).collect();
    Ok((StatusCode::CREATED, stages, Json(sandboxes)).into_response())
}

/// What `POST /v1/sandboxes` answers: the sandboxes, or with `partial` what each fork came to.
#[derive(serde::Serialize, utoipa::ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "describes the answer in the interface's document")]
pub(crate) enum Created {
    All(Vec<SandboxInfo>),
    Partial(PartialSandboxes),
}

fn fork_request(body: &CreateSandboxes) -> Result<ForkRequest, ApiError> {
    let mut request = ForkRequest::new(body.snapshot_tag.clone(), body.n);
    request.partial = body.partial;
    request.env = body.env.clone();
    request.metadata = body.metadata.clone();
    request.memory_limit_mib = body.memory_limit_mib;
    request.cpu_limit_milli = body.cpu_limit_milli;
    request.pids_limit = body.pids_limit;
    request.io_limit = body.io_limit.map(convert::io_limit_of).unwrap_or_default();
    request.network = body.network.as_ref().map(convert::policy).transpose()?;
    if let Some(secs) = body.timeout_secs {
        request.timeout = Some(super::seconds("timeout_secs", secs, TIMEOUT_SECS_MAX)?);
    }
    if let Some(secs) = body.ready_timeout_secs {
        request.ready_timeout = super::seconds("ready_timeout_secs", secs, READY_SECS_MAX)?;
    }
    request.validate()?;
    Ok(request)
}

fn stage_headers(outcome: &ForkOutcome) -> HeaderMap {
    let stages = [
        (TEMPLATE_MS, outcome.template),
        (FORKED_MS, outcome.forked),
        (READY_MS, outcome.ready),
    ];
    let mut headers = HeaderMap::new();
    for (name, duration) in stages {
        if let Ok(value) = HeaderValue::from_str(&convert::millis(duration).to_string()) {
            headers.insert(name, value);
        }
    }
    headers
}

/// Sandboxes, oldest first. Those that have ended are left out unless asked for by `status=ended`.
#[utoipa::path(get, path = "/v1/sandboxes", tag = "sandboxes", params(ListSandboxes),
    responses((status = 200, body = Vec<SandboxInfo>,
        headers(("forkd-next" = String, description = "Names the next page, if there is one"))), Failures))]
pub(crate) async fn list(
    State(app): State<App>,
    Query(query): Query<ListSandboxes>,
) -> Result<Response, ApiError> {
    let metadata = metadata_filter(query.metadata.as_deref())?;
    let limit = query.limit.unwrap_or(PAGE_MAX);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(ApiError::invalid(format!(
            "limit is {limit}, must be within 1..={PAGE_MAX}"
        )));
    }
    let after = query.after.as_deref().map(parse_cursor).transpose()?;
    let mut views = app.node().sandboxes();
    views.retain(|view| {
        let wanted = match query.status {
            Some(state) => convert::sandbox_state(view.status) == state,
            None => view.status != SandboxStatus::Ended,
        };
        let has = |(key, value): &(&str, &str)| view.metadata.get(*key).is_some_and(|v| v == value);
        wanted
            && query.tag.as_ref().is_none_or(|tag| view.tag == *tag)
            && metadata.iter().all(has)
            && after
                .as_ref()
                .is_none_or(|after| (view.created_at_unix, view.id.as_str()) > (after.0, after.1))
    });
    views.sort_by(|a, b| (a.created_at_unix, &a.id).cmp(&(b.created_at_unix, &b.id)));
    let limit = limit as usize;
    let mut headers = HeaderMap::new();
    if views.len() > limit {
        views.truncate(limit);
        let next = views.last().map(cursor).unwrap_or_default();
        if let Ok(next) = HeaderValue::from_str(&next) {
            headers.insert(NEXT_PAGE, next);
        }
    }
    let infos: Vec<SandboxInfo> = views.into_iter().map(convert::sandbox).collect();
    Ok((headers, Json(infos)).into_response())
}

fn cursor(view: &SandboxView) -> String {
    format!("{}.{}", view.created_at_unix, view.id)
}

fn parse_cursor(text: &str) -> Result<(u64, &str), ApiError> {
    let parts = text
        .split_once('.')
        .and_then(|(time, id)| Some((time.parse().ok()?, id)));
    parts.ok_or_else(|| {
        ApiError::invalid(format!(
            "after is {text:?}, which no list has given as {NEXT_PAGE}"
        ))
    })
}

fn metadata_filter(text: Option<&str>) -> Result<Vec<(&str, &str)>, ApiError> {
    let pairs = text
        .unwrap_or_default()
        .split(',')
        .filter(|pair| !pair.is_empty());
    let parse = |pair: &'_ str| -> ApiError {
        ApiError::invalid(format!("metadata holds {pair:?}, which is not key=value"))
    };
    pairs
        .map(|pair| pair.split_once('=').ok_or_else(|| parse(pair)))
        .collect()
}

/// One sandbox.
#[utoipa::path(get, path = "/v1/sandboxes/{id}", tag = "sandboxes", params(("id" = SandboxId, Path)),
    responses((status = 200, body = SandboxInfo), Failures))]
pub(crate) async fn get(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
) -> Result<Json<SandboxInfo>, ApiError> {
    Ok(Json(convert::sandbox(app.known(&id)?)))
}

/// Kills a sandbox. Answers when nothing of it is left.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}", tag = "sandboxes", params(("id" = SandboxId, Path)),
    responses((status = 204), Failures))]
pub(crate) async fn kill(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
) -> Result<StatusCode, ApiError> {
    app.known(&id)?;
    app.node().kill(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Stops a sandbox's vCPUs. Idempotent.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/pause", tag = "sandboxes", params(("id" = SandboxId, Path)),
    responses((status = 200, body = SandboxInfo), Failures))]
pub(crate) async fn pause(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
) -> Result<Json<SandboxInfo>, ApiError> {
    app.known(&id)?;
    app.node().pause(&id).await?;
    Ok(Json(convert::sandbox(app.known(&id)?)))
}

/// Lets a paused sandbox go on. Idempotent.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/resume", tag = "sandboxes", params(("id" = SandboxId, Path)),
    responses((status = 200, body = SandboxInfo), Failures))]
pub(crate) async fn resume(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
) -> Result<Json<SandboxInfo>, ApiError> {
    app.known(&id)?;
    app.node().resume(&id).await?;
    Ok(Json(convert::sandbox(app.known(&id)?)))
}

/// Changes what a running sandbox may reach. Connections that are no longer allowed end.
#[utoipa::path(put, path = "/v1/sandboxes/{id}/network", tag = "sandboxes",
    params(("id" = SandboxId, Path)), request_body = NetworkPolicy,
    responses((status = 200, body = SandboxInfo), Failures))]
pub(crate) async fn network(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Json(body): Json<NetworkPolicy>,
) -> Result<Json<SandboxInfo>, ApiError> {
    app.known(&id)?;
    if body.mode == NetworkMode::None {
        return Err(ApiError::invalid(
            "the network mode is fixed when a sandbox is made; to let it reach nothing, deny all",
        ));
    }
    let view = app.node().set_network(&id, convert::policy(&body)?).await?;
    Ok(Json(convert::sandbox(view)))
}

/// Memory of a sandbox's VM process.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/memory", tag = "sandboxes", params(("id" = SandboxId, Path)),
    responses((status = 200, body = MemoryUse), Failures))]
pub(crate) async fn memory(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
) -> Result<Json<MemoryUse>, ApiError> {
    app.known(&id)?;
    Ok(Json(convert::memory(app.node().memory(&id).await?)))
}

/// Freezes a running sandbox into a new snapshot while it goes on.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/branch", tag = "sandboxes",
    params(("id" = SandboxId, Path)), request_body(content = BranchSandbox),
    responses((status = 201, body = SnapshotInfo), (status = 202, body = SnapshotInfo), Failures))]
pub(crate) async fn branch(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    OptionalJson(body): OptionalJson<BranchSandbox>,
) -> Result<(StatusCode, Json<SnapshotInfo>), ApiError> {
    let mode = branch_mode(&body)?;
    let source = app.known(&id)?;
    if let Some(expected) = &body.parent_tag {
        let below = source.tag;
        if below != *expected {
            return Err(ApiError::invalid(format!(
                "parent_tag is {expected}, but the sandbox was forked from {below}"
            )));
        }
    }
    let request = BranchRequest {
        id,
        tag: body.tag,
        full: mode == BranchMode::Full,
        wait: body.wait,
    };
    let place = app.branch_place()?;
    let begun = Instant::now();
    let view = app.node().branch(request).await.map_err(ApiError::from);
    drop(place);
    let view = view.map_err(|error| match error.code() {
        ErrorCode::Busy => error.status(StatusCode::SERVICE_UNAVAILABLE),
        _ => error,
    })?;
    app.metrics().branch(view.pause);
    let status = if body.wait {
        StatusCode::CREATED
    } else {
        StatusCode::ACCEPTED
    };
    let mut info = convert::snapshot(view);
    let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    info.diff_ms = (mode == BranchMode::Diff).then_some(took);
    Ok((status, Json(info)))
}

fn branch_mode(body: &BranchSandbox) -> Result<BranchMode, ApiError> {
    let older = [body.measure_diff, body.diff, body.live];
    if older.iter().filter(|set| **set).count() > 1 {
        return Err(ApiError::invalid(
            "give only one of diff, live and measure_diff",
        ));
    }
    if body.mode.is_some() && (body.diff || body.live) {
        return Err(ApiError::invalid(
            "give either mode, or diff or live, not both",
        ));
    }
    let mode = match body.mode {
        Some(mode) => mode,
        None if body.live => BranchMode::Live,
        None if body.diff => BranchMode::Diff,
        None => BranchMode::Full,
    };
    if !body.wait && mode != BranchMode::Live {
        return Err(ApiError::invalid(
            "wait is false, which needs mode \"live\"",
        ));
    }
    if body.parent_tag.is_some() && mode != BranchMode::Diff {
        return Err(ApiError::invalid(
            "parent_tag is given, which needs mode \"diff\"",
        ));
    }
    Ok(mode)
}
