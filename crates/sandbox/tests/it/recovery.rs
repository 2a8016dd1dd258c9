//! What a later node makes of what an earlier one left. The fake's machines do not outlive their engine, so
//! every recorded sandbox is found gone here; adoption is shown with real machines.

use forkd_engine::fake::FakeConfig;
use forkd_sandbox::view::SandboxStatus;
use forkd_wire::error::ErrorCode;

use crate::world::{World, open};

#[tokio::test]
async fn two_nodes_do_not_share_a_state() {
    let world = World::new(FakeConfig::default()).await;
    let error = open(world.dir.path(), FakeConfig::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InUse);
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    assert!(error.remedy().unwrap().contains("--daemon-url"));
}

#[tokio::test]
async fn gone_sandboxes_are_told_once_and_leave_nothing() {
    let world = World::with_base(FakeConfig::default()).await;
    let id = world.one("base").await;
    let (world, recovery) = world.reopen(FakeConfig::default()).await;
    assert_eq!(recovery.lost.len(), 1, "{recovery:?}");
    assert_eq!(recovery.lost[0].0, id);
    assert!(world.run_files().is_empty());
    assert_eq!(
        world.node.sandbox(&id).unwrap().status,
        SandboxStatus::Ended
    );
    let (world, recovery) = world.reopen(FakeConfig::default()).await;
    assert_eq!(recovery.lost, vec![]);
    assert_eq!(world.one("base").await.as_str().len(), "sb-".len() + 12);
}

#[tokio::test]
async fn stray_run_directories_and_templates_are_swept() {
    let world = World::with_base(FakeConfig::default()).await;
    let stray = world.dir.path().join("run/sb-stray");
    let template = world.dir.path().join("snapshots/.templates/stray");
    for dir in [&stray, &template] {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("file"), "x").unwrap();
    }
    let (world, recovery) = world.reopen(FakeConfig::default()).await;
    assert!(
        recovery.swept.iter().any(|s| s.ends_with("sb-stray")),
        "{recovery:?}"
    );
    assert!(!stray.exists() && !template.exists());
    assert_eq!(world.node.snapshots().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_damaged_state_file_is_named_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("state.db"), vec![1; 8192]).unwrap();
    let error = open(dir.path(), FakeConfig::default()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Corrupt);
    assert!(error.to_string().contains("state.db"), "{error}");
    assert!(error.remedy().is_some());
}
