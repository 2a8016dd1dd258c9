//! The daemon's calls by name and type.

use axum::body::Body;
use forkd_wire::api::exec::{Eval, EvalResult, Exec, ExecResult};
use forkd_wire::api::files::{FileInfo, MakeDirectory};
use forkd_wire::api::node::Version;
use forkd_wire::api::sandbox::{
    BranchSandbox, CreateSandboxes, ForkResult, MemoryUse, NetworkPolicy, PartialSandboxes, Pong,
    SandboxInfo,
};
use forkd_wire::api::snapshot::{
    CreateSnapshot, SnapshotInfo, SnapshotInfoDetail, SnapshotStep, SnapshotStepEvent,
};
use forkd_wire::api::{FORKED_MS, READY_MS, TEMPLATE_MS};
use forkd_wire::id::{SandboxId, Tag};
use futures_util::StreamExt;
use http::{HeaderMap, Method, Response};

use super::{Client, from_body};
use crate::failure::Failure;
use crate::query;

/// What a fork request came to.
#[derive(Debug, Clone)]
pub struct Forked {
    /// One entry per fork, in order of index.
    pub children: Vec<ForkResult>,
    /// Milliseconds until the template could be forked.
    pub template_ms: Option<f64>,
    /// Milliseconds until the last VM ran.
    pub forked_ms: Option<f64>,
    /// Milliseconds until the last agent had answered.
    pub ready_ms: Option<f64>,
}

impl Client {
    /// Who answers.
    pub async fn version(&self) -> Result<Version, Failure> {
        self.json(Method::GET, "/version").await
    }

    /// Every snapshot.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        self.json(Method::GET, "/v1/snapshots").await
    }

    /// One snapshot.
    pub async fn snapshot_info(&self, tag: &Tag) -> Result<SnapshotInfoDetail, Failure> {
        self.json(Method::GET, &format!("/v1/snapshots/{tag}/info"))
            .await
    }

    /// Boots an image, warms it, freezes it, and tells the steps as they begin.
    pub async fn create_snapshot(
        &self,
        request: &CreateSnapshot,
        mut step: impl FnMut(SnapshotStep),
    ) -> Result<SnapshotInfo, Failure> {
        let path = "/v1/snapshots?progress=true";
        let response = self.send_json(Method::POST, path, request).await?;
        let mut events = super::events::Events::new(response.into_body());
        while let Some(event) = events.next().await? {
            match event.name.as_str() {
                "step" => step(event.json::<SnapshotStepEvent>()?.step),
                "result" => return event.json(),
                "error" => return Err(from_body(event.json()?)),
                _ => (),
            }
        }
        Err(
            Failure::new("the daemon stopped talking while the snapshot was made")
                .with_help("see the daemon's log; `forkd images` shows what came of it"),
        )
    }

    /// Removes a snapshot.
    pub async fn remove_snapshot(&self, tag: &Tag, cascade: bool) -> Result<(), Failure> {
        let query = if cascade { "?cascade=true" } else { "" };
        self.done(Method::DELETE, &format!("/v1/snapshots/{tag}{query}"))
            .await
    }

    /// Forks.
    pub async fn fork(&self, request: &CreateSandboxes) -> Result<Forked, Failure> {
        let response = self
            .send_json(Method::POST, "/v1/sandboxes", request)
            .await?;
        let head = response.headers().clone();
        let children = if request.partial {
            super::decode::<PartialSandboxes>(response).await?.sandboxes
        } else {
            let all: Vec<SandboxInfo> = super::decode(response).await?;
            all.into_iter().map(ForkResult::Sandbox).collect()
        };
        Ok(Forked {
            children,
            template_ms: number(&head, TEMPLATE_MS),
            forked_ms: number(&head, FORKED_MS),
            ready_ms: number(&head, READY_MS),
        })
    }

    /// Every sandbox, or those of one snapshot.
    pub async fn sandboxes(&self, tag: Option<&Tag>) -> Result<Vec<SandboxInfo>, Failure> {
        let path = match tag {
            Some(tag) => format!("/v1/sandboxes?tag={}", query::escape(tag.as_str())),
            None => "/v1/sandboxes".to_owned(),
        };
        self.json(Method::GET, &path).await
    }

    /// One sandbox.
    pub async fn sandbox(&self, id: &SandboxId) -> Result<SandboxInfo, Failure> {
        self.json(Method::GET, &format!("/v1/sandboxes/{id}")).await
    }

    /// Kills a sandbox; answers when nothing of it is left.
    pub async fn kill(&self, id: &SandboxId) -> Result<(), Failure> {
        self.done(Method::DELETE, &format!("/v1/sandboxes/{id}"))
            .await
    }

    /// Stops a sandbox's processors.
    pub async fn pause(&self, id: &SandboxId) -> Result<(), Failure> {
        self.done(Method::POST, &format!("/v1/sandboxes/{id}/pause"))
            .await
    }

    /// Lets a paused sandbox go on.
    pub async fn resume(&self, id: &SandboxId) -> Result<(), Failure> {
        self.done(Method::POST, &format!("/v1/sandboxes/{id}/resume"))
            .await
    }

    /// Changes what a sandbox may reach.
    pub async fn set_network(
        &self,
        id: &SandboxId,
        policy: &NetworkPolicy,
    ) -> Result<SandboxInfo, Failure> {
        self.call(Method::PUT, &format!("/v1/sandboxes/{id}/network"), policy)
            .await
    }

    /// Freezes a running sandbox into a new snapshot.
    pub async fn branch(
        &self,
        id: &SandboxId,
        request: &BranchSandbox,
    ) -> Result<SnapshotInfo, Failure> {
        self.call(Method::POST, &format!("/v1/sandboxes/{id}/branch"), request)
            .await
    }

    /// Asks the agent whether it is there.
    pub async fn ping(&self, id: &SandboxId) -> Result<Pong, Failure> {
        self.json(Method::POST, &format!("/v1/sandboxes/{id}/ping"))
            .await
    }

    /// Memory of a sandbox's VM process.
    pub async fn memory(&self, id: &SandboxId) -> Result<MemoryUse, Failure> {
        self.json(Method::GET, &format!("/v1/sandboxes/{id}/memory"))
            .await
    }

    /// Runs a command and answers with all of its output.
    pub async fn exec(&self, id: &SandboxId, request: &Exec) -> Result<ExecResult, Failure> {
        self.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), request)
            .await
    }

    /// Runs Python code.
    pub async fn eval(&self, id: &SandboxId, request: &Eval) -> Result<EvalResult, Failure> {
        self.call(Method::POST, &format!("/v1/sandboxes/{id}/eval"), request)
            .await
    }

    /// What is known of a file of the guest.
    pub async fn stat(&self, id: &SandboxId, path: &str) -> Result<FileInfo, Failure> {
        let path = query::escape(path);
        self.json(
            Method::GET,
            &format!("/v1/sandboxes/{id}/files/stat?path={path}"),
        )
        .await
    }

    /// Makes a directory in the guest, with its parents.
    pub async fn make_directory(&self, id: &SandboxId, path: &str) -> Result<(), Failure> {
        let body = MakeDirectory {
            path: path.to_owned(),
        };
        let path = format!("/v1/sandboxes/{id}/files/mkdir");
        self.send_json(Method::POST, &path, &body).await.map(drop)
    }

    /// A file of the guest, as a stream.
    pub async fn read_file(&self, id: &SandboxId, path: &str) -> Result<Body, Failure> {
        let path = format!("/v1/sandboxes/{id}/files?path={}", query::escape(path));
        let answer = self.stream(Method::GET, &path, Body::empty(), None).await?;
        Ok(answer.into_body())
    }

    /// Writes a file of the guest from a stream.
    pub async fn write_file(
        &self,
        id: &SandboxId,
        path: &str,
        mode: Option<u32>,
        body: Body,
    ) -> Result<(), Failure> {
        let mode = mode.map_or_else(String::new, |mode| format!("&mode={mode:o}"));
        let path = format!(
            "/v1/sandboxes/{id}/files?path={}{mode}",
            query::escape(path)
        );
        let kind = Some("application/octet-stream");
        self.stream(Method::PUT, &path, body, kind).await.map(drop)
    }

    /// The guest's console, as a stream; with `follow` it ends with the sandbox.
    pub async fn console(&self, id: &SandboxId, follow: bool) -> Result<Body, Failure> {
        let query = if follow { "?follow=true" } else { "" };
        let path = format!("/v1/sandboxes/{id}/console{query}");
        let answer: Response<Body> = self.stream(Method::GET, &path, Body::empty(), None).await?;
        Ok(answer.into_body())
    }
}

fn number(head: &HeaderMap, name: &str) -> Option<f64> {
    head.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// Reads a body chunk by chunk.
pub async fn each_chunk(
    body: Body,
    mut chunk: impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut stream = body.into_data_stream();
    while let Some(next) = stream.next().await {
        let bytes = next.map_err(|error| Failure::caused("the stream broke off", &error))?;
        chunk(&bytes)?;
    }
    Ok(())
}
