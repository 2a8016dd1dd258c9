//! Workspaces.

use axum::extract::State;
use forkd_wire::api::workspace::{CreateWorkspace, SuspendWorkspace, WorkspaceInfo};
use forkd_wire::id::Tag;
use http::StatusCode;

use super::failures::Failures;
use crate::ApiError;
use crate::http::extract::{Json, OptionalJson, Path};
use crate::state::App;

/// Every workspace, by name.
#[utoipa::path(get, path = "/v1/workspaces", tag = "workspaces",
    responses((status = 200, body = Vec<WorkspaceInfo>), Failures))]
pub(crate) async fn list(State(app): State<App>) -> Result<Json<Vec<WorkspaceInfo>>, ApiError> {
    Ok(Json(app.workspaces().list().await?))
}

/// Forks a snapshot into a sandbox with a name.
#[utoipa::path(post, path = "/v1/workspaces", tag = "workspaces", request_body = CreateWorkspace,
    responses((status = 201, body = WorkspaceInfo), Failures))]
pub(crate) async fn create(
    State(app): State<App>,
    Json(body): Json<CreateWorkspace>,
) -> Result<(StatusCode, Json<WorkspaceInfo>), ApiError> {
    Ok((
        StatusCode::CREATED,
        Json(app.workspaces().create(body).await?),
    ))
}

/// One workspace.
#[utoipa::path(get, path = "/v1/workspaces/{name}", tag = "workspaces", params(("name" = Tag, Path)),
    responses((status = 200, body = WorkspaceInfo), Failures))]
pub(crate) async fn get(
    State(app): State<App>,
    Path(name): Path<Tag>,
) -> Result<Json<WorkspaceInfo>, ApiError> {
    Ok(Json(app.workspaces().get(&name).await?))
}

/// Ends a workspace: its sandbox and its state go, its source stays.
#[utoipa::path(delete, path = "/v1/workspaces/{name}", tag = "workspaces", params(("name" = Tag, Path)),
    responses((status = 204), Failures))]
pub(crate) async fn remove(
    State(app): State<App>,
    Path(name): Path<Tag>,
) -> Result<StatusCode, ApiError> {
    app.workspaces().remove(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Freezes a workspace's sandbox into a snapshot and ends the sandbox.
#[utoipa::path(post, path = "/v1/workspaces/{name}/suspend", tag = "workspaces",
    params(("name" = Tag, Path)), request_body(content = SuspendWorkspace),
    responses((status = 200, body = WorkspaceInfo), Failures))]
pub(crate) async fn suspend(
    State(app): State<App>,
    Path(name): Path<Tag>,
    OptionalJson(body): OptionalJson<SuspendWorkspace>,
) -> Result<Json<WorkspaceInfo>, ApiError> {
    Ok(Json(app.workspaces().suspend(&name, body.diff).await?))
}

/// Goes on where the workspace was suspended.
#[utoipa::path(post, path = "/v1/workspaces/{name}/resume", tag = "workspaces", params(("name" = Tag, Path)),
    responses((status = 200, body = WorkspaceInfo), Failures))]
pub(crate) async fn resume(
    State(app): State<App>,
    Path(name): Path<Tag>,
) -> Result<Json<WorkspaceInfo>, ApiError> {
    Ok(Json(app.workspaces().resume(&name).await?))
}
