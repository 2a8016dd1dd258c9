//! Branching running sandboxes.

use std::time::Duration;

use forkd_engine::fake::FakeConfig;
use forkd_sandbox::spec::{BranchRequest, RemoveMode};
use forkd_sandbox::view::SandboxStatus;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;

use crate::world::{World, tag};

fn request(id: &SandboxId, name: &str, full: bool) -> BranchRequest {
    BranchRequest {
        id: id.clone(),
        tag: Some(tag(name)),
        full,
        wait: true,
    }
}

#[tokio::test]
async fn a_branch_has_what_the_sandbox_had_and_the_sandbox_goes_on() {
    for full in [false, true] {
        let world = World::with_base(FakeConfig::default()).await;
        let id = world.one("base").await;
        world.eval(&id, "x = 1").await;
        let branch = world.node.branch(request(&id, "mid", full)).await.unwrap();
        assert_eq!(branch.branched_from.as_ref(), Some(&id));
        assert_eq!(branch.layered, !full);
        assert!(branch.pause.is_some());
        world.eval(&id, "x = 2").await;
        let child = world.one("mid").await;
        assert_eq!(world.eval(&child, "x").await, Some("1".into()));
        assert_eq!(world.eval(&id, "x").await, Some("2".into()));
        assert_eq!(world.node.sandbox(&id).unwrap().branches, 1);
    }
}

#[tokio::test]
async fn a_branch_of_a_branch_of_a_branch() {
    let world = World::with_base(FakeConfig::default()).await;
    let mut name = "base".to_owned();
    for depth in 1..=4 {
        let id = world.one(&name).await;
        world.eval(&id, &format!("x = {depth}")).await;
        name = format!("depth{depth}");
        world.node.branch(request(&id, &name, false)).await.unwrap();
    }
    let id = world.one("depth4").await;
    assert_eq!(world.eval(&id, "x").await, Some("4".into()));
    let flat = world
        .node
        .compact(&tag("depth4"), &tag("flat"))
        .await
        .unwrap();
    assert!(!flat.layered);
    let id = world.one("flat").await;
    assert_eq!(world.eval(&id, "x").await, Some("4".into()));
}

#[tokio::test]
async fn a_base_goes_with_its_branches_or_not_at_all() {
    let world = World::with_base(FakeConfig::default()).await;
    let id = world.one("base").await;
    world.node.branch(request(&id, "mid", false)).await.unwrap();
    world.node.kill(&id).await.unwrap();
    let error = world
        .node
        .remove_snapshot(&tag("base"), RemoveMode::Refuse)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InUse);
    assert!(error.to_string().contains("mid"), "{error}");
    let child = world.one("mid").await;
    world
        .node
        .remove_snapshot(&tag("base"), RemoveMode::Cascade)
        .await
        .unwrap();
    assert_eq!(
        world.node.sandbox(&child).unwrap().status,
        SandboxStatus::Ended
    );
    assert!(world.node.snapshots().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_failed_save_leaves_the_sandbox_running_and_no_snapshot() {
    let world = World::with_base(FakeConfig::default()).await;
    let (world, _) = world
        .reopen(FakeConfig {
            fail_save: true,
            ..FakeConfig::default()
        })
        .await;
    let id = world.one("base").await;
    assert!(world.node.branch(request(&id, "mid", false)).await.is_err());
    assert_eq!(world.eval(&id, "1").await, Some("1".into()));
    assert_eq!(world.node.snapshots().await.unwrap().len(), 1);
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_sandbox_killed_while_it_is_branched() {
    let config = FakeConfig {
        save_delay: Duration::from_millis(500),
        ..FakeConfig::default()
    };
    let world = World::with_base(config).await;
    let id = world.one("base").await;
    let branching = world.node.branch(request(&id, "mid", false));
    let killing = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        world.node.kill(&id).await.unwrap();
    };
    let (branched, ()) = tokio::join!(branching, killing);
    assert_eq!(branched.unwrap_err().code(), ErrorCode::NotReady);
    assert_eq!(world.node.snapshots().await.unwrap().len(), 1);
    assert!(world.leftovers().is_empty() && world.run_files().is_empty());
}
