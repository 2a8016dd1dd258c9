//! Snapshots.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use forkd_sandbox::spec::{RemoveMode, SnapshotRequest};
use forkd_sandbox::view::{SnapshotOutcome, SnapshotStep};
use forkd_wire::api::snapshot::{
    CompactSnapshot, CreateSnapshot, SnapshotInfo, SnapshotInfoDetail, SnapshotStepEvent,
};
use forkd_wire::id::Tag;
use futures_util::Stream;
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::failures::Failures;
use crate::ApiError;
use crate::convert;
use crate::http::extract::{Json, Path, Query};
use crate::state::App;

/// Every snapshot, by tag; unusable ones say why in `warning`.
#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshots",
    responses((status = 200, body = Vec<SnapshotInfo>), Failures))]
pub(crate) async fn list(State(app): State<App>) -> Result<Json<Vec<SnapshotInfo>>, ApiError> {
    let views = app.node().snapshots().await?;
    Ok(Json(views.into_iter().map(convert::snapshot).collect()))
}

/// Query of `POST /v1/snapshots`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct CreateQuery {
    /// Stream the steps as server-sent events, as `Accept: text/event-stream` does.
    #[serde(default)]
    #[param(required = false)]
    progress: bool,
}

/// Boots an image, warms it and freezes it.
///
/// Answers when the snapshot can be forked. As server-sent events: `step` per step, then `result` or `error`.
#[utoipa::path(post, path = "/v1/snapshots", tag = "snapshots", params(CreateQuery),
    request_body = CreateSnapshot,
    responses((status = 201, body = SnapshotInfo),
        (status = 200, content_type = "text/event-stream", body = String), Failures))]
pub(crate) async fn create(
    State(app): State<App>,
    Query(query): Query<CreateQuery>,
    headers: HeaderMap,
    Json(body): Json<CreateSnapshot>,
) -> Result<Response, ApiError> {
    let request = snapshot_request(&app, &body).await?;
    let accepts = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    if query.progress || accepts.is_some_and(|accept| accept.contains("text/event-stream")) {
        let events = Sse::new(steps(app, request)).keep_alive(KeepAlive::default());
        return Ok(events.into_response());
    }
    let outcome = make(app, request, None).await?;
    Ok((StatusCode::CREATED, Json(created(outcome))).into_response())
}

async fn snapshot_request(app: &App, body: &CreateSnapshot) -> Result<SnapshotRequest, ApiError> {
    if body.boot_wait_secs > 60 {
        return Err(ApiError::invalid(format!(
            "boot_wait_secs is {}, must be within 0..=60",
            body.boot_wait_secs
        )));
    }
    let warm = convert::warm(body)?;
    let image = app.images().resolve(body).await?;
    let mut request = SnapshotRequest::new(body.tag.clone(), image);
    request.memory_mib = body.memory_mib;
    request.vcpus = body.vcpus;
    request.warm = warm;
    request.labels = body.labels.clone();
    if let Some(secs) = body.boot_timeout_secs {
        request.boot_timeout = super::seconds("boot_timeout_secs", secs, 3600)?;
    }
    request.validate()?;
    Ok(request)
}

fn created(outcome: SnapshotOutcome) -> SnapshotInfo {
    let mut info = convert::snapshot(outcome.snapshot);
    info.stages = Some(convert::snapshot_stages(outcome.stages));
    info
}

async fn make(app: App, request: SnapshotRequest, steps: Steps) -> Outcome {
    let outcome = app.node().create_snapshot(request, steps).await?;
    app.metrics().snapshot(&outcome.stages);
    Ok(outcome)
}

type Steps = Option<mpsc::UnboundedSender<SnapshotStep>>;
type Outcome = Result<SnapshotOutcome, ApiError>;

/// The steps as they begin, then the result. When the reader leaves, what was begun is undone.
fn steps(app: App, request: SnapshotRequest) -> impl Stream<Item = Result<Event, Infallible>> {
    let begun = Instant::now();
    let (tell, steps) = mpsc::unbounded_channel::<SnapshotStep>();
    let work = AbortOnDropHandle::new(tokio::spawn(make(app, request, Some(tell))));
    futures_util::stream::unfold(Some((steps, work)), move |state| async move {
        let (mut steps, work) = state?;
        if let Some(step) = steps.recv().await {
            return Some((Ok(step_event(step, begun.elapsed())), Some((steps, work))));
        }
        let outcome = work.await.unwrap_or_else(|failure| {
            Err(ApiError::new(
                forkd_wire::error::ErrorCode::Internal,
                failure.to_string(),
            ))
        });
        Some((Ok(last_event(outcome)), None))
    })
}

fn step_event(step: SnapshotStep, elapsed: Duration) -> Event {
    let step = SnapshotStepEvent {
        step: convert::snapshot_step(step),
        elapsed_ms: convert::millis(elapsed),
    };
    super::event("step", &step)
}

fn last_event(outcome: Outcome) -> Event {
    match outcome {
        Ok(outcome) => super::event("result", &created(outcome)),
        Err(error) => super::event("error", &error.into_body()),
    }
}

/// One snapshot with its place in the lineage.
#[utoipa::path(get, path = "/v1/snapshots/{tag}/info", tag = "snapshots", params(("tag" = Tag, Path)),
    responses((status = 200, body = SnapshotInfoDetail), Failures))]
pub(crate) async fn info(
    State(app): State<App>,
    Path(tag): Path<Tag>,
) -> Result<Json<SnapshotInfoDetail>, ApiError> {
    let view = app.node().snapshot(&tag).await?;
    let (dependents, sandboxes) = app.node().dependents(&tag).await?;
    let all = app.node().snapshots().await?;
    let parent = view
        .parent
        .as_ref()
        .and_then(|parent| all.iter().find(|s| s.tag == *parent));
    let mut ancestors: Vec<Tag> = Vec::new();
    let mut next = view.parent.clone();
    while let Some(tag) = next.filter(|tag| !ancestors.contains(tag)) {
        next = all
            .iter()
            .find(|s| s.tag == tag)
            .and_then(|s| s.parent.clone());
        ancestors.insert(0, tag);
    }
    let state = tokio::fs::metadata(view.dir.join("state.bin")).await;
    let vmstate_bytes = state.map_or(0, |meta| meta.len());
    Ok(Json(SnapshotInfoDetail {
        tag,
        dir: view.dir.display().to_string(),
        created_at_unix: Some(view.created_at_unix),
        memory_logical_bytes: view.memory_logical_bytes,
        memory_physical_bytes: view.physical_bytes.saturating_sub(vmstate_bytes),
        vmstate_bytes,
        parent_tag: view.parent.clone(),
        parent_content_hash: parent.map(|parent| parent.id.clone()),
        chain_depth: u32::try_from(ancestors.len()).unwrap_or(u32::MAX),
        dependents,
        ancestors,
        sandboxes,
        snapshot: convert::snapshot(view),
    }))
}

/// Query of `DELETE /v1/snapshots/{tag}`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct RemoveQuery {
    /// Remove its descendants too, and kill the sandboxes of all of them.
    #[serde(default)]
    #[param(required = false)]
    cascade: bool,
    /// Give up the name and leave what depends on it alone.
    #[serde(default)]
    #[param(required = false)]
    force: bool,
}

/// Removes a snapshot.
#[utoipa::path(delete, path = "/v1/snapshots/{tag}", tag = "snapshots",
    params(("tag" = Tag, Path), RemoveQuery),
    responses((status = 204), Failures))]
pub(crate) async fn remove(
    State(app): State<App>,
    Path(tag): Path<Tag>,
    Query(query): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let mode = match (query.cascade, query.force) {
        (true, true) => return Err(ApiError::invalid("give either cascade or force, not both")),
        (false, false) => RemoveMode::Refuse,
        (true, false) => RemoveMode::Cascade,
        (false, true) => RemoveMode::Force,
    };
    app.node().remove_snapshot(&tag, mode).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Writes a snapshot without layers that equals this one.
#[utoipa::path(post, path = "/v1/snapshots/{tag}/compact", tag = "snapshots",
    params(("tag" = Tag, Path)), request_body = CompactSnapshot,
    responses((status = 200, body = SnapshotInfo), Failures))]
pub(crate) async fn compact(
    State(app): State<App>,
    Path(tag): Path<Tag>,
    Json(body): Json<CompactSnapshot>,
) -> Result<Json<SnapshotInfo>, ApiError> {
    if body.to == tag {
        return Err(ApiError::invalid(
            "a snapshot cannot be compacted into itself",
        ));
    }
    let origin = format!("compact:{tag}");
    let view = app.node().compact(&tag, &body.to).await?;
    let mut info = convert::snapshot(view);
    info.branched_from = Some(origin);
    Ok(Json(info))
}
