//! Making and removing snapshots.

use std::time::Duration;

use forkd_engine::fake::FakeConfig;
use forkd_sandbox::spec::{RemoveMode, Warm};
use forkd_sandbox::view::{SandboxStatus, SnapshotStatus, SnapshotStep};
use forkd_wire::error::ErrorCode;

use crate::world::{World, eventually, tag};

#[tokio::test]
async fn steps_are_told_and_the_warm_up_is_inherited() {
    let world = World::new(FakeConfig::default()).await;
    let (steps, mut told) = tokio::sync::mpsc::unbounded_channel();
    let mut request = world.request("warm");
    request.warm = Warm::Python("answer = 42".into());
    let made = world
        .node
        .create_snapshot(request, Some(steps))
        .await
        .unwrap();
    assert_eq!(made.snapshot.status, SnapshotStatus::Ready);
    assert_eq!(made.snapshot.warm.as_deref(), Some("answer = 42"));
    assert!(made.snapshot.labels.contains_key("boot_ms"));
    let mut seen = vec![];
    while let Some(step) = told.recv().await {
        seen.push(step);
    }
    use SnapshotStep::{Booting, Publishing, Saving, Warming};
    assert_eq!(seen, [Booting, Warming, Saving, Publishing]);
    let id = world.one("warm").await;
    assert_eq!(world.eval(&id, "answer").await, Some("42".into()));
}

#[tokio::test]
async fn a_taken_tag_is_refused() {
    let world = World::with_base(FakeConfig::default()).await;
    let error = world
        .node
        .create_snapshot(world.request("base"), None)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::AlreadyExists);
}

#[tokio::test]
async fn whatever_fails_leaves_nothing() {
    let boot = FakeConfig {
        fail_boot: true,
        ..FakeConfig::default()
    };
    let save = FakeConfig {
        fail_save: true,
        ..FakeConfig::default()
    };
    let mute = FakeConfig {
        mute: true,
        ..FakeConfig::default()
    };
    for config in [boot, save, mute] {
        let world = World::new(config.clone()).await;
        let mut request = world.request("s");
        request.boot_timeout = Duration::from_millis(200);
        let error = world.node.create_snapshot(request, None).await.unwrap_err();
        assert!(!error.chain().is_empty());
        assert!(
            world.node.snapshots().await.unwrap().is_empty(),
            "{config:?}"
        );
        assert!(world.run_files().is_empty(), "{config:?}");
        assert!(
            world.leftovers().is_empty(),
            "{config:?}: {:?}",
            world.leftovers()
        );
    }
}

#[tokio::test]
async fn a_failing_warm_up_says_what_failed() {
    let world = World::new(FakeConfig::default()).await;
    let mut request = world.request("s");
    request.warm = Warm::Command("false".into());
    let error = world.node.create_snapshot(request, None).await.unwrap_err();
    assert!(error.to_string().contains("warm-up"), "{error}");
    assert!(world.run_files().is_empty());
}

#[tokio::test]
async fn a_caller_that_goes_away_undoes_the_making() {
    let config = FakeConfig {
        boot_delay: Duration::from_secs(30),
        ..FakeConfig::default()
    };
    let world = World::new(config).await;
    let making = world.node.create_snapshot(world.request("s"), None);
    assert!(
        tokio::time::timeout(Duration::from_millis(100), making)
            .await
            .is_err()
    );
    eventually("the draft goes", || {
        world.leftovers().is_empty() && world.run_files().is_empty()
    })
    .await;
    assert!(world.node.snapshots().await.unwrap().is_empty());
}

#[tokio::test]
async fn ranges_are_checked_before_anything_is_done() {
    let world = World::new(FakeConfig::default()).await;
    let mut request = world.request("s");
    request.memory_mib = 1;
    let error = world.node.create_snapshot(request, None).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
    assert!(error.to_string().contains("64..=262144"), "{error}");
}

#[tokio::test]
async fn more_memory_than_the_host_has_is_refused() {
    let world = World::new(FakeConfig::default()).await;
    let mut request = world.request("s");
    request.memory_mib = 262_144;
    let error = world.node.create_snapshot(request, None).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InsufficientResources);
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_snapshot_in_use_is_kept_unless_told_otherwise() {
    let world = World::with_base(FakeConfig::default()).await;
    let id = world.one("base").await;
    let error = world
        .node
        .remove_snapshot(&tag("base"), RemoveMode::Refuse)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InUse);
    assert!(error.to_string().contains(id.as_str()), "{error}");
    world
        .node
        .remove_snapshot(&tag("base"), RemoveMode::Cascade)
        .await
        .unwrap();
    assert_eq!(
        world.node.sandbox(&id).unwrap().status,
        SandboxStatus::Ended
    );
    assert!(world.node.snapshots().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_truncated_snapshot_is_named_and_can_be_removed() {
    let world = World::with_base(FakeConfig::default()).await;
    let state = world.dir.path().join("snapshots/base/state.bin");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&state)
        .unwrap()
        .set_len(1)
        .unwrap();
    let request = forkd_sandbox::spec::ForkRequest::new(tag("base"), 1);
    let error = world.node.fork(request).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Corrupt);
    assert!(error.chain().contains("state.bin"), "{}", error.chain());
    let listed = world.node.snapshots().await.unwrap();
    assert_eq!(listed[0].status, SnapshotStatus::Failed);
    world
        .node
        .remove_snapshot(&tag("base"), RemoveMode::Refuse)
        .await
        .unwrap();
    assert!(world.node.snapshots().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_manifest_of_another_version_is_refused_with_both_named() {
    let world = World::with_base(FakeConfig::default()).await;
    let path = world.dir.path().join("snapshots/base/manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("\"schema_version\": 1", "\"schema_version\": 99"),
    )
    .unwrap();
    let error = world.node.snapshot(&tag("base")).await.unwrap_err();
    assert!(error.chain().contains("99"), "{}", error.chain());
}
