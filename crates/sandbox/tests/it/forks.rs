//! Forking, and every way it can be cut short.

use std::time::Duration;

use forkd_engine::fake::FakeConfig;
use forkd_sandbox::spec::ForkRequest;
use forkd_sandbox::view::{Close, SandboxStatus};
use forkd_wire::error::ErrorCode;

use crate::world::{World, eventually, tag};

#[tokio::test]
async fn forks_inherit_and_do_not_see_each_other() {
    let world = World::with_base(FakeConfig::default()).await;
    let views = world.fork("base", 3).await;
    for (i, view) in views.iter().enumerate() {
        assert_eq!(view.status, SandboxStatus::Running);
        assert_eq!(view.index as usize, i);
        assert!(view.stages.forked <= view.stages.ready);
        world.eval(&view.id, &format!("x = {i}")).await;
    }
    for (i, view) in views.iter().enumerate() {
        assert_eq!(world.eval(&view.id, "x").await, Some(i.to_string()));
    }
    world.node.close(Close::KillAll).await;
    assert_eq!(world.run_files(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn a_kill_leaves_nothing_and_is_idempotent() {
    let world = World::with_base(FakeConfig::default()).await;
    let id = world.one("base").await;
    world.node.kill(&id).await.unwrap();
    world.node.kill(&id).await.unwrap();
    assert_eq!(
        world.node.sandbox(&id).unwrap().status,
        SandboxStatus::Ended
    );
    assert_eq!(
        world.node.guest(&id).unwrap_err().code(),
        ErrorCode::NotReady
    );
    assert!(world.run_files().is_empty());
}

#[tokio::test]
async fn what_is_unknown_is_not_found() {
    let world = World::new(FakeConfig::default()).await;
    let error = world
        .node
        .fork(ForkRequest::new(tag("nobody"), 1))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotFound);
    assert!(error.to_string().contains("nobody"), "{error}");
    let id = forkd_wire::id::SandboxId::new("sb-nobody").unwrap();
    assert_eq!(
        world.node.kill(&id).await.unwrap_err().code(),
        ErrorCode::NotFound
    );
}

#[tokio::test]
async fn one_failure_undoes_all_unless_a_part_is_welcome() {
    let config = FakeConfig {
        fail_fork_every: Some(3),
        ..FakeConfig::default()
    };
    let world = World::with_base(config).await;
    let error = world
        .node
        .fork(ForkRequest::new(tag("base"), 5))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("1 of 5 forks of base failed, all were undone"),
        "{error}"
    );
    assert!(
        world
            .node
            .sandboxes()
            .iter()
            .all(|v| v.status == SandboxStatus::Ended)
    );
    assert!(world.run_files().is_empty());

    let request = ForkRequest {
        partial: true,
        ..ForkRequest::new(tag("base"), 6)
    };
    let outcome = world.node.fork(request).await.unwrap();
    assert_eq!(outcome.children.iter().filter(|c| c.is_err()).count(), 2);
    assert_eq!(world.run_files().len(), 4);
}

#[tokio::test]
async fn a_guest_that_never_answers_ends_in_time() {
    let world = World::with_base(FakeConfig::default()).await;
    let (world, _) = world
        .reopen(FakeConfig {
            mute: true,
            ..FakeConfig::default()
        })
        .await;
    let request = ForkRequest {
        ready_timeout: Duration::from_millis(200),
        ..ForkRequest::new(tag("base"), 2)
    };
    let error = world.node.fork(request).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestUnreachable);
    assert!(
        error.to_string().contains("did not become ready"),
        "{error}"
    );
    assert!(world.run_files().is_empty());
}

#[tokio::test]
async fn a_caller_that_goes_away_undoes_its_forks() {
    let config = FakeConfig {
        fork_delay: Duration::from_millis(150),
        ..FakeConfig::default()
    };
    let world = World::with_base(config).await;
    let request = world.node.fork(ForkRequest::new(tag("base"), 4));
    assert!(
        tokio::time::timeout(Duration::from_millis(60), request)
            .await
            .is_err()
    );
    eventually("the forks end", || {
        let views = world.node.sandboxes();
        views.len() == 4 && views.iter().all(|v| v.status == SandboxStatus::Ended)
    })
    .await;
    assert!(world.run_files().is_empty());
}

#[tokio::test]
async fn a_caller_that_has_its_answer_keeps_its_forks() {
    let world = World::with_base(FakeConfig::default()).await;
    for _ in 0..30 {
        let id = world.one("base").await;
        tokio::task::yield_now().await;
        assert_eq!(
            world.node.sandbox(&id).unwrap().status,
            SandboxStatus::Running
        );
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(
        world
            .node
            .sandboxes()
            .iter()
            .all(|v| v.status == SandboxStatus::Running)
    );
}

#[tokio::test]
async fn a_deadline_ends_a_sandbox_and_says_so() {
    let world = World::with_base(FakeConfig::default()).await;
    let request = ForkRequest {
        timeout: Some(Duration::from_millis(1)),
        ..ForkRequest::new(tag("base"), 1)
    };
    let id = world
        .node
        .fork(request)
        .await
        .unwrap()
        .children
        .remove(0)
        .unwrap()
        .id;
    eventually("its end", || {
        world.node.sandbox(&id).unwrap().status == SandboxStatus::Ended
    })
    .await;
    let why = world.node.sandbox(&id).unwrap().ended.unwrap();
    assert_eq!(why, "its timeout passed");
}

#[tokio::test]
async fn a_vm_that_dies_is_noticed() {
    let exit_after = Some(Duration::from_millis(300));
    let world = World::with_base(FakeConfig::default()).await;
    let (world, _) = world
        .reopen(FakeConfig {
            exit_after,
            ..FakeConfig::default()
        })
        .await;
    let id = world.one("base").await;
    eventually("its end", || {
        world.node.sandbox(&id).unwrap().status == SandboxStatus::Ended
    })
    .await;
    let why = world.node.sandbox(&id).unwrap().ended.unwrap();
    assert!(why.contains("killed by signal"), "{why}");
    assert!(world.run_files().is_empty());
}

#[tokio::test]
async fn pause_and_resume() {
    let world = World::with_base(FakeConfig::default()).await;
    let id = world.one("base").await;
    world.node.pause(&id).await.unwrap();
    world.node.pause(&id).await.unwrap();
    assert_eq!(
        world.node.sandbox(&id).unwrap().status,
        SandboxStatus::Paused
    );
    let error = world.node.guest(&id).unwrap_err();
    assert_eq!(error.remedy(), Some("resume it first"));
    world.node.resume(&id).await.unwrap();
    assert_eq!(world.eval(&id, "1 + 1").await, Some("2".into()));
}

#[tokio::test]
async fn a_closed_node_refuses() {
    let world = World::with_base(FakeConfig::default()).await;
    world.fork("base", 2).await;
    world.node.close(Close::KillAll).await;
    let error = world
        .node
        .fork(ForkRequest::new(tag("base"), 1))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::ShuttingDown);
    assert!(world.run_files().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_at_once() {
    let world = World::with_base(FakeConfig::default()).await;
    assert_eq!(world.fork("base", 300).await.len(), 300);
    world.node.close(Close::KillAll).await;
    assert!(world.run_files().is_empty());
}
