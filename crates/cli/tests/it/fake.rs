//! The commands against a daemon that runs the fake engine: fast, and without any guest.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;

use forkd_cli::client::Client;
use forkd_daemon::{NodePaths, Options};
use forkd_engine::Lifetime;
use forkd_engine::fake::Fake;
use forkd_wire::api::snapshot::CreateSnapshot;
use serde_json::Value;

use super::world::{Said, finish};

/// A daemon in this process, and the snapshot `seed` on it.
struct Node {
    dir: tempfile::TempDir,
    url: String,
    _runtime: tokio::runtime::Runtime,
}

impl Node {
    fn new() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        let paths = NodePaths::below(&dir.path().join("data"), &dir.path().join("run"));
        let address = runtime.block_on(serve(&paths));
        let url = format!("http://{address}");
        let node = Node {
            dir,
            url,
            _runtime: runtime,
        };
        node.seed();
        node
    }

    fn seed(&self) {
        let file = |name: &str| {
            let path = self.dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            Some(path)
        };
        let mut request = CreateSnapshot::of_image("seed".parse().unwrap(), "");
        request.image = None;
        (request.kernel, request.initramfs) = (file("kernel"), file("initramfs"));
        request.rootfs = file("rootfs");
        request.memory_mib = 64;
        request.warm = Some("inherited = 41".to_owned());
        let client = Client::web(&self.url, None).unwrap();
        self._runtime
            .block_on(client.create_snapshot(&request, |_| ()))
            .unwrap();
    }

    fn run<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkd"));
        command
            .args(args)
            .env("FORKD_URL", &self.url)
            .env("FORKD_DATA_DIR", self.dir.path().join("data"))
            .env("NO_COLOR", "1")
            .stdin(std::process::Stdio::null());
        finish(command)
    }

    fn json<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Value {
        let out = self.run(args).ok();
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
    }
}

async fn serve(paths: &NodePaths) -> SocketAddr {
    let engine = Arc::new(Fake::default());
    let opened = forkd_daemon::open_node(
        paths,
        engine,
        Lifetime::DieWithParent,
        forkd_sandbox::Isolation::OFF,
        forkd_sandbox::Admission::default(),
    )
    .await;
    let (node, _) = opened.unwrap();
    let router = forkd_daemon::router(node, Options::embedded(paths.clone()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

#[test]
fn sandboxes_from_fork_to_kill() {
    let node = Node::new();
    let args = [
        "fork",
        "--tag",
        "seed",
        "-n",
        "3",
        "--env",
        "A=b",
        "--metadata",
        "k=v",
        "--json",
    ];
    let forked = node.json(args);
    let sandboxes = forked["sandboxes"].as_array().unwrap();
    assert_eq!(sandboxes.len(), 3);
    assert!(forked["ready_ms"].is_number(), "{forked}");
    let id = sandboxes[0]["id"].as_str().unwrap();

    assert_eq!(
        node.json(["ls", "--tag", "seed", "--json"])
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert_eq!(
        node.json(["ls", "--tag", "other", "--json"])
            .as_array()
            .unwrap()
            .len(),
        0
    );
    assert_eq!(
        node.run(["exec", id, "--", "echo", "two  words"]).ok(),
        "two  words\n"
    );
    assert_eq!(node.run(["exec", id, "--", "printenv", "A"]).ok(), "b\n");
    // Quicker than the client can say that there is no input.
    for _ in 0..50 {
        assert_eq!(node.run(["exec", id, "--", "exit", "7"]).code, Some(7));
    }
    assert_eq!(node.run(["eval", id, "--", "inherited + 1"]).ok(), "42\n");
    assert_eq!(
        node.run(["eval", id, "--", "raise ValueError"]).code,
        Some(1)
    );
    assert_eq!(node.run(["branch", id, "--tag", "mid"]).ok(), "mid\n");

    let images = node.json(["images", "--json"]);
    let mut tags: Vec<&str> = images
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["tag"].as_str().unwrap())
        .collect();
    tags.sort_unstable();
    assert_eq!(tags, ["mid", "seed"]);
    assert!(node.run(["images"]).ok().starts_with("TAG "));
    node.run(["rmi", "seed"]).fails(1, &["help: "]);

    node.run(["kill", id]).ok();
    node.run(["kill", "sb-nobody"]).fails(1, &["sb-nobody"]);
    node.run(["kill", "--tag", "seed"]).ok();
    assert_eq!(node.run(["ls", "--quiet"]).ok(), "");
    node.run(["rmi", "mid", "seed"]).ok();
    node.run(["fork", "--tag", "seed"]).fails(1, &["seed"]);
}

#[test]
fn a_bench_that_fails_leaves_nothing() {
    let node = Node::new();
    // The fake's machines are no processes, so that their memory cannot be measured.
    let said = node.run(["bench", "--tag", "seed", "--n", "50"]);
    said.fails(1, &["cannot measure"]);
    assert_eq!(node.run(["ls", "--quiet"]).ok(), "");
}

#[test]
fn wrong_usage_ends_with_two() {
    let node = Node::new();
    for args in [
        &["fork"][..],
        &["nonsense"],
        &["kill", "--all", "sb-1"],
        &["cp", "a", "b"],
    ] {
        assert_eq!(node.run(args.iter().copied()).code, Some(2), "{args:?}");
    }
    let help = node.run(["fork", "--help"]);
    assert!(help.err.is_empty() && help.ok().contains("Examples:"));
}
