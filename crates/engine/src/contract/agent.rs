//! Just enough of a client for the guest's agent: health, files, shutdown.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forkd_wire::agent::filesystem::FILES_PATH;
use forkd_wire::agent::{HEALTH_PATH, Health, SHUTDOWN_PATH};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::time::timeout;

use crate::Vm;

/// How long one call may take, on a busy machine.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest that is coming up may take to answer before it is dialled again.
const GREETING_LIMIT: Duration = Duration::from_secs(4);

/// A connection to a guest's agent. Dropped, it ends.
#[derive(Debug)]
pub struct Agent {
    sender: SendRequest<Full<Bytes>>,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Agent {
    /// Opens a connection; `None` where that fails.
    pub async fn connect(vm: &Arc<dyn Vm>) -> Option<Agent> {
        let stream = TokioIo::new(vm.dial().await.ok()?);
        let handshake = http2::handshake(TokioExecutor::new(), stream).await;
        let (sender, connection) = handshake.ok()?;
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        Some(Agent { sender, driver })
    }

    /// A call; `None` where the connection or the guest does not answer in time.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: &[u8],
    ) -> Option<(StatusCode, Bytes)> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://guest{path}"))
            .header("content-type", content_type(path))
            .body(Full::new(Bytes::copy_from_slice(body)))
            .unwrap();
        let mut sender = self.sender.clone();
        let answer = async {
            let response = sender.send_request(request).await.ok()?;
            let status = response.status();
            let body = response.into_body().collect().await.ok()?.to_bytes();
            Some((status, body))
        };
        timeout(CALL_LIMIT, answer).await.ok()?
    }

    /// Whether the guest answers.
    pub async fn answers(&self) -> bool {
        self.call(Method::GET, HEALTH_PATH, b"").await.is_some()
    }

    /// Writes a file in the guest.
    pub async fn write(&self, path: &str, content: &[u8]) {
        let uri = format!("{FILES_PATH}?path={path}&username=root");
        let (status, body) = self
            .call(Method::POST, &uri, content)
            .await
            .expect("answer");
        assert!(status.is_success(), "writing {path}: {status} {body:?}");
    }

    /// Reads a file in the guest; `None` if there is none.
    pub async fn read(&self, path: &str) -> Option<Vec<u8>> {
        let uri = format!("{FILES_PATH}?path={path}&username=root");
        let (status, body) = self.call(Method::GET, &uri, b"").await.expect("answer");
        match status {
            StatusCode::NOT_FOUND => None,
            _ => {
                assert!(status.is_success(), "reading {path}: {status} {body:?}");
                Some(body.to_vec())
            }
        }
    }

    /// Asks the guest to power off.
    pub async fn shut_down(&self) {
        // The answer may be lost on the way out.
        let _ = self.call(Method::POST, SHUTDOWN_PATH, b"{}").await;
    }
}

fn content_type(path: &str) -> &'static str {
    match path.starts_with(FILES_PATH) {
        true => "application/octet-stream",
        false => "application/json",
    }
}

/// Asks a guest how it is; `None` where it does not answer.
pub async fn ask_health(agent: &Agent) -> Option<Health> {
    let (_, body) = agent.call(Method::GET, HEALTH_PATH, b"").await?;
    serde_json::from_slice(&body).ok()
}

/// Connects until the guest answers.
pub(super) async fn reach(vm: &Arc<dyn Vm>, patience: Duration) -> Agent {
    let began = Instant::now();
    loop {
        if let Some(agent) = Agent::connect(vm).await
            && let Ok(Some(health)) = timeout(GREETING_LIMIT, ask_health(&agent)).await
        {
            assert!(health.protocol > 0);
            return agent;
        }
        let console = std::fs::read_to_string(vm.console()).unwrap_or_default();
        assert!(
            began.elapsed() < patience,
            "the guest does not answer; its console:\n{console}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
