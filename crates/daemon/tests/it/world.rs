//! A node of its own for every test: real router, real heart, guests that are processes, a temporary directory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use forkd_daemon::audit::Audit;
use forkd_daemon::auth::Access;
use forkd_daemon::{NodePaths, Options};
use forkd_engine::Lifetime;
use forkd_sandbox::view::Close;
use forkd_sandbox::{Admission, Node};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt;

use crate::engine::Host;

pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) paths: NodePaths,
    pub(crate) engine: Arc<Host>,
    node: Option<Node>,
    admission: Admission,
    pub(crate) router: Router,
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) bytes: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|error| {
            panic!(
                "{error}: {} {}",
                self.status,
                String::from_utf8_lossy(&self.bytes)
            )
        })
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.bytes.clone()).unwrap()
    }

    /// The body, of an answer with this status.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Value {
        let text = String::from_utf8_lossy(&self.bytes).into_owned();
        assert_eq!(self.status.as_u16(), status, "{text}");
        if self.bytes.is_empty() {
            Value::Null
        } else {
            self.json()
        }
    }

    /// The code of a refusal in the one shape that every refusal has.
    #[track_caller]
    pub(crate) fn refusal(self, status: u16) -> String {
        let body = self.expect(status);
        let fields: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert!(
            fields
                .iter()
                .all(|f| ["error", "code", "remedy"].contains(&f.as_str())),
            "{body}"
        );
        assert!(!body["error"].as_str().unwrap().is_empty(), "{body}");
        body["code"].as_str().unwrap().to_owned()
    }
}

impl World {
    pub(crate) async fn new() -> World {
        World::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Options)) -> World {
        World::bounded(Admission::default(), change).await
    }

    /// A world whose node takes on only so much.
    pub(crate) async fn bounded(admission: Admission, change: impl FnOnce(&mut Options)) -> World {
        let dir = TempDir::new().unwrap();
        let paths = NodePaths::below(&dir.path().join("data"), &dir.path().join("run"));
        let engine = Arc::new(Host::default());
        let (node, router) = open(&paths, &engine, admission, change).await;
        for file in ["kernel", "initramfs", "rootfs"] {
            std::fs::write(dir.path().join(file), file).unwrap();
        }
        World {
            dir,
            paths,
            engine,
            node: Some(node),
            admission,
            router,
        }
    }

    /// A world with a token of each scope, `read`, `use` and `admin`, and an audit log.
    pub(crate) async fn guarded() -> World {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("tokens");
        let line = |scope: &str| format!("{scope}:{scope}:{}\n", token(scope));
        std::fs::write(&file, ["read", "use", "admin"].map(line).concat()).unwrap();
        World::with(|options| {
            options.access = Arc::new(Access::from_path(&file).unwrap());
            let log = options.paths.data.join("audit.log");
            options.audit = Arc::new(Audit::to_file(&log).unwrap());
        })
        .await
    }

    /// The daemon goes and comes back; sandboxes stay.
    pub(crate) async fn restart(&mut self) {
        if let Some(node) = self.node.take() {
            node.close(Close::Leave).await;
        }
        self.router = Router::new();
        // The old node lets go of its lock when the last of its tasks has ended.
        for attempt in 0.. {
            let engine = self.engine.clone();
            match forkd_daemon::open_node(
                &self.paths,
                engine,
                Lifetime::Survive,
                forkd_sandbox::Isolation::OFF,
                self.admission,
            )
            .await
            {
                Ok((node, _)) => {
                    let options = Options::embedded(self.paths.clone());
                    self.node = Some(node.clone());
                    self.router = forkd_daemon::router(node, options);
                    return;
                }
                Err(_) if attempt < 250 => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => panic!("not opened again: {error:?}"),
            }
        }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes().to_vec();
        Answer {
            status: parts.status,
            headers: parts.headers,
            bytes,
        }
    }

    pub(crate) async fn call(&self, method: Method, path: &str, body: Value) -> Answer {
        self.send(request(method, path, body)).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, Value::Null).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(Method::POST, path, body).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.call(Method::DELETE, path, Value::Null).await
    }

    pub(crate) fn snapshot_body(&self, tag: &str) -> Value {
        let path = |name: &str| self.dir.path().join(name);
        json!({
            "tag": tag, "kernel": path("kernel"), "initramfs": path("initramfs"),
            "rootfs": path("rootfs"), "memory_mib": 64,
        })
    }

    pub(crate) async fn snapshot(&self, tag: &str) -> Value {
        self.post("/v1/snapshots", self.snapshot_body(tag))
            .await
            .expect(201)
    }

    pub(crate) async fn fork(&self, tag: &str, n: usize) -> Vec<Value> {
        let body = json!({"snapshot_tag": tag, "n": n});
        let made = self.post("/v1/sandboxes", body).await.expect(201);
        made.as_array().unwrap().clone()
    }

    /// A snapshot `base` and one sandbox of it, by id.
    pub(crate) async fn sandbox(&self) -> String {
        self.snapshot("base").await;
        id(&self.fork("base", 1).await[0])
    }

    pub(crate) fn fail_every_second_fork(&self) {
        self.engine
            .every_second_fails
            .store(true, Ordering::Relaxed);
    }

    pub(crate) async fn close(mut self) {
        if let Some(node) = self.node.take() {
            node.close(Close::KillAll).await;
        }
    }
}

async fn open(
    paths: &NodePaths,
    engine: &Arc<Host>,
    admission: Admission,
    change: impl FnOnce(&mut Options),
) -> (Node, Router) {
    let opened = forkd_daemon::open_node(
        paths,
        engine.clone(),
        Lifetime::Survive,
        forkd_sandbox::Isolation::OFF,
        admission,
    )
    .await;
    let (node, _) = opened.unwrap();
    let mut options = Options::embedded(paths.clone());
    change(&mut options);
    (node.clone(), forkd_daemon::router(node, options))
}

pub(crate) fn token(scope: &str) -> String {
    format!("token-with-scope-{scope}")
}

pub(crate) fn request(method: Method, path: &str, body: Value) -> Request<Body> {
    let request = Request::builder().method(method).uri(path);
    let request = request.header("user-agent", "tests");
    match body {
        Value::Null => request.body(Body::empty()).unwrap(),
        body => {
            let request = request.header("content-type", "application/json");
            request.body(Body::from(body.to_string())).unwrap()
        }
    }
}

pub(crate) fn id(sandbox: &Value) -> String {
    sandbox["id"].as_str().unwrap().to_owned()
}

/// Tries until it holds.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("did not happen: {what}");
}
