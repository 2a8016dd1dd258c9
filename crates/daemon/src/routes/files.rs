//! Files in a sandbox, and its console.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_sandbox::Node;
use forkd_sandbox::view::SandboxStatus;
use forkd_wire::agent::filesystem::{EntryInfo, FileType};
use forkd_wire::api::files::{
    FileInfo, FileKind, FilePath, ListFiles, MakeDirectory, MoveFile, WriteFile,
};
use forkd_wire::id::SandboxId;
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::failures::Failures;
use crate::ApiError;
use crate::http::extract::{Json, Path, Query};
use crate::state::App;

/// Deepest listing.
const DEPTH_MAX: u32 = 64;
/// How often a followed console is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);
/// Bytes of console read at once.
const CONSOLE_CHUNK: usize = 64 * 1024;

/// The bytes of a file.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/files", tag = "files",
    params(("id" = SandboxId, Path), FilePath),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), Failures))]
pub(crate) async fn read(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Query(query): Query<FilePath>,
) -> Result<Response, ApiError> {
    let file = app.guest(&id)?.read_file(&query.path).await?;
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    if let Some(size) = file.size() {
        headers.insert(header::CONTENT_LENGTH, size.into());
    }
    let chunks = futures_util::stream::unfold(file, |mut file| async move {
        let chunk = file.next().await.map_err(io::Error::other).transpose()?;
        Some((chunk, file))
    });
    Ok((headers, Body::from_stream(chunks)).into_response())
}

/// Writes a file from the request's body, and makes the directories above it.
#[utoipa::path(put, path = "/v1/sandboxes/{id}/files", tag = "files",
    params(("id" = SandboxId, Path), WriteFile),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204), Failures))]
pub(crate) async fn write(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Query(query): Query<WriteFile>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let mode = query.mode.as_deref().map(octal).transpose()?;
    let client = app.guest(&id)?;
    let content = body
        .into_data_stream()
        .map(|chunk| chunk.map_err(io::Error::other));
    client.write_file(&query.path, content, mode).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn octal(text: &str) -> Result<u32, ApiError> {
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| ApiError::invalid(format!("mode is {text:?}, must be octal such as 755")))
}

/// Removes a file, or a directory with all it holds.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}/files", tag = "files",
    params(("id" = SandboxId, Path), FilePath), responses((status = 204), Failures))]
pub(crate) async fn remove(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Query(query): Query<FilePath>,
) -> Result<StatusCode, ApiError> {
    app.guest(&id)?.remove(&query.path).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A directory's entries.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/files/list", tag = "files",
    params(("id" = SandboxId, Path), ListFiles),
    responses((status = 200, body = Vec<FileInfo>), Failures))]
pub(crate) async fn list(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Query(query): Query<ListFiles>,
) -> Result<Json<Vec<FileInfo>>, ApiError> {
    if !(1..=DEPTH_MAX).contains(&query.depth) {
        let text = format!("depth is {}, must be within 1..={DEPTH_MAX}", query.depth);
        return Err(ApiError::invalid(text));
    }
    let entries = app.guest(&id)?.list_dir(&query.path, query.depth).await?;
    Ok(Json(entries.into_iter().map(info).collect()))
}

/// What is known of a file.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/files/stat", tag = "files",
    params(("id" = SandboxId, Path), FilePath), responses((status = 200, body = FileInfo), Failures))]
pub(crate) async fn stat(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Query(query): Query<FilePath>,
) -> Result<Json<FileInfo>, ApiError> {
    Ok(Json(info(app.guest(&id)?.stat(&query.path).await?)))
}

/// Makes a directory and those above it.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/files/mkdir", tag = "files",
    params(("id" = SandboxId, Path)), request_body = MakeDirectory,
    responses((status = 200, body = FileInfo), Failures))]
pub(crate) async fn mkdir(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Json(body): Json<MakeDirectory>,
) -> Result<Json<FileInfo>, ApiError> {
    Ok(Json(info(app.guest(&id)?.make_dir(&body.path).await?)))
}

/// Renames a file or directory.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/files/move", tag = "files",
    params(("id" = SandboxId, Path)), request_body = MoveFile,
    responses((status = 200, body = FileInfo), Failures))]
pub(crate) async fn rename(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Json(body): Json<MoveFile>,
) -> Result<Json<FileInfo>, ApiError> {
    Ok(Json(info(
        app.guest(&id)?.rename(&body.from, &body.to).await?,
    )))
}

fn info(entry: EntryInfo) -> FileInfo {
    let kind = match (&entry.symlink_target, entry.kind) {
        (Some(_), _) => FileKind::Symlink,
        (None, FileType::File) => FileKind::File,
        (None, FileType::Directory) => FileKind::Directory,
        (None, FileType::Other) => FileKind::Other,
    };
    FileInfo {
        name: entry.name,
        path: entry.path,
        kind,
        size: u64::try_from(entry.size).unwrap_or(0),
        mode: entry.mode,
        owner: entry.owner,
        group: entry.group,
        modified: Some(entry.modified_time).filter(|time| !time.is_empty()),
        target: entry.symlink_target,
    }
}

/// Query of `GET /v1/sandboxes/{id}/console`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ConsoleQuery {
    /// Go on with what the guest writes, until the sandbox ends.
    #[serde(default)]
    #[param(required = false)]
    follow: bool,
    /// Only this many bytes of what is there already.
    tail: Option<u64>,
}

/// What the guest has written to its console.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/console", tag = "guest",
    params(("id" = SandboxId, Path), ConsoleQuery),
    responses((status = 200, content_type = "text/plain", body = String), Failures))]
pub(crate) async fn console(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Query(query): Query<ConsoleQuery>,
) -> Result<Response, ApiError> {
    app.known(&id)?;
    let path = app.node().console(&id)?;
    let opened = async {
        let mut file = File::open(&path).await?;
        if let Some(tail) = query.tail {
            let len = file.metadata().await?.len();
            file.seek(io::SeekFrom::Start(len.saturating_sub(tail)))
                .await?;
        }
        Ok::<File, io::Error>(file)
    };
    let file = opened.await.map_err(|error| {
        let code = forkd_wire::error::ErrorCode::NotFound;
        ApiError::new(code, format!("the console of {id} cannot be read: {error}"))
    })?;
    let follow = query.follow.then(|| (app.node().clone(), id));
    let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    Ok((headers, Body::from_stream(console_chunks(file, follow))).into_response())
}

fn console_chunks(
    file: File,
    follow: Option<(Node, SandboxId)>,
) -> impl Stream<Item = io::Result<Bytes>> {
    futures_util::stream::unfold((file, follow), |(mut file, follow)| async move {
        let mut chunk = vec![0; CONSOLE_CHUNK];
        loop {
            // Asked before reading: what is written between the two is read, and only then is it over.
            let over = follow.as_ref().is_none_or(|(node, id)| has_ended(node, id));
            match file.read(&mut chunk).await {
                Ok(0) if over => return None,
                Ok(0) => tokio::time::sleep(FOLLOW_EVERY).await,
                Ok(len) => {
                    chunk.truncate(len);
                    return Some((Ok(chunk.into()), (file, follow)));
                }
                Err(error) => return Some((Err(error), (file, None))),
            }
        }
    })
}

fn has_ended(node: &Node, id: &SandboxId) -> bool {
    node.sandbox(id)
        .map_or(true, |view| view.status == SandboxStatus::Ended)
}
