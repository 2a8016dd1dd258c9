//! A node of its own for each test.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forkd_engine::Lifetime;
use forkd_engine::fake::{Fake, FakeConfig};
use forkd_sandbox::spec::{ForkRequest, ImageFiles, NodeConfig, SnapshotRequest};
use forkd_sandbox::view::{Recovery, SandboxView};
use forkd_sandbox::{Admission, Isolation, Node};
use forkd_wire::agent::EvalRequest;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::{SandboxId, Tag};

/// How long a test waits for what should happen at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) node: Node,
}

impl World {
    pub(crate) async fn new(config: FakeConfig) -> World {
        World::inside(tempfile::tempdir().unwrap(), config).await
    }

    /// A world in a directory that has been prepared.
    pub(crate) async fn inside(dir: tempfile::TempDir, config: FakeConfig) -> World {
        for file in ["kernel", "initramfs", "rootfs"] {
            std::fs::write(dir.path().join(file), file).unwrap();
        }
        let (node, _) = open(dir.path(), config).await.unwrap();
        World { dir, node }
    }

    /// A world with one snapshot, `base`.
    pub(crate) async fn with_base(config: FakeConfig) -> World {
        let world = World::new(config).await;
        world.make_base().await;
        world
    }

    pub(crate) async fn make_base(&self) {
        let request = self.request("base");
        self.node.create_snapshot(request, None).await.unwrap();
    }

    pub(crate) fn request(&self, name: &str) -> SnapshotRequest {
        let path = |file| self.dir.path().join(file);
        let image = ImageFiles {
            name: "image".into(),
            digest: "digest".into(),
            kernel: path("kernel"),
            initramfs: path("initramfs"),
            rootfs: path("rootfs"),
        };
        SnapshotRequest {
            memory_mib: 64,
            ..SnapshotRequest::new(tag(name), image)
        }
    }

    pub(crate) async fn fork(&self, name: &str, n: u32) -> Vec<SandboxView> {
        let outcome = self
            .node
            .fork(ForkRequest::new(tag(name), n))
            .await
            .unwrap();
        outcome.children.into_iter().map(Result::unwrap).collect()
    }

    pub(crate) async fn one(&self, name: &str) -> SandboxId {
        self.fork(name, 1).await.remove(0).id
    }

    pub(crate) async fn eval(&self, id: &SandboxId, code: &str) -> Option<String> {
        let request = EvalRequest {
            language: "python".into(),
            code: code.into(),
            timeout_ms: 0,
        };
        let answer = self
            .node
            .guest(id)
            .unwrap()
            .eval(request, PATIENCE)
            .await
            .unwrap();
        assert_eq!(answer.error, None, "{code}");
        answer.result
    }

    /// Closes the node without ending its sandboxes, as a daemon that is upgraded does, and opens it again.
    pub(crate) async fn reopen(self, config: FakeConfig) -> (World, Recovery) {
        self.node.close(forkd_sandbox::view::Close::Leave).await;
        let World { dir, node } = self;
        drop(node);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            match open(dir.path(), config.clone()).await {
                Ok((node, recovery)) => return (World { dir, node }, recovery),
                // The last task of the node before lets go of the lock a moment later.
                Err(e) if e.code() == ErrorCode::InUse => {
                    assert!(
                        tokio::time::Instant::now() < deadline,
                        "the lock is never released"
                    );
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(e) => panic!("{}", e.chain()),
            }
        }
    }

    pub(crate) fn run_files(&self) -> Vec<PathBuf> {
        list(&self.dir.path().join("run"))
    }

    /// Names in the snapshot root that do not belong to a published snapshot.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        let snapshots = self.dir.path().join("snapshots");
        let hidden = |p: &PathBuf| p.file_name().unwrap().to_string_lossy().starts_with('.');
        let known = |p: &PathBuf| p.ends_with(".lock") || p.ends_with(".templates");
        list(&snapshots)
            .into_iter()
            .filter(|p| hidden(p) && !known(p))
            .collect()
    }
}

pub(crate) async fn open(
    dir: &Path,
    config: FakeConfig,
) -> Result<(Node, Recovery), forkd_sandbox::Error> {
    open_bounded(dir, config, Admission::default()).await
}

pub(crate) async fn open_bounded(
    dir: &Path,
    config: FakeConfig,
    admission: Admission,
) -> Result<(Node, Recovery), forkd_sandbox::Error> {
    open_as(dir, config, Isolation::OFF, admission).await
}

pub(crate) async fn open_with(
    dir: &Path,
    config: FakeConfig,
    isolation: Isolation,
) -> Result<(Node, Recovery), forkd_sandbox::Error> {
    open_as(dir, config, isolation, Admission::default()).await
}

async fn open_as(
    dir: &Path,
    config: FakeConfig,
    isolation: Isolation,
    admission: Admission,
) -> Result<(Node, Recovery), forkd_sandbox::Error> {
    let node_config = NodeConfig {
        snapshot_root: dir.join("snapshots"),
        state: dir.join("state.db"),
        run_dir: dir.join("run"),
        lifetime: Lifetime::Survive,
        isolation,
        admission,
    };
    Node::open(node_config, Arc::new(Fake::new(config))).await
}

pub(crate) fn tag(name: &str) -> Tag {
    Tag::new(name).unwrap()
}

fn list(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

/// Waits until something holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
