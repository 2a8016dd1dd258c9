//! A node that takes on only so much.

use forkd_engine::fake::FakeConfig;
use forkd_sandbox::spec::{ForkRequest, IoLimit, SnapshotRequest};
use forkd_sandbox::view::Close;
use forkd_sandbox::{Admission, Isolation, Node};
use forkd_wire::error::ErrorCode;

use crate::world::{World, open_bounded, open_with, tag};

/// A world with the snapshot `base` of two virtual CPUs, opened again with these bounds.
async fn bounded(admission: Admission) -> World {
    let world = World::new(FakeConfig::default()).await;
    let request = SnapshotRequest {
        vcpus: 2,
        ..world.request("base")
    };
    world.node.create_snapshot(request, None).await.unwrap();
    reopen(world, admission).await
}

async fn reopen(world: World, admission: Admission) -> World {
    let World { dir, node } = world;
    node.close(Close::Leave).await;
    drop(node);
    for _ in 0..1000 {
        match open_bounded(dir.path(), FakeConfig::default(), admission).await {
            Ok((node, _)) => return World { dir, node },
            Err(e) if e.code() == ErrorCode::InUse => tokio::task::yield_now().await,
            Err(e) => panic!("{}", e.chain()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("the lock is never released")
}

async fn refused(node: &Node, n: u32) -> forkd_sandbox::Error {
    node.fork(ForkRequest::new(tag("base"), n))
        .await
        .unwrap_err()
}

#[tokio::test]
async fn as_many_sandboxes_as_there_may_be() {
    let world = bounded(Admission {
        sandboxes_max: 3,
        ..Admission::default()
    })
    .await;
    let views = world.fork("base", 2).await;
    let error = refused(&world.node, 2).await;
    assert_eq!(error.code(), ErrorCode::Busy);
    let said = error.to_string();
    assert!(said.contains("2 forks of base"), "{said}");
    assert!(said.contains("has 2 sandboxes and may have 3"), "{said}");
    world.fork("base", 1).await;
    assert!(world.node.room().full.unwrap().contains("may have 3"));
    // Whoever has ended makes room.
    world.node.kill(&views[0].id).await.unwrap();
    assert_eq!(world.node.room().full, None);
    world.fork("base", 1).await;
    assert_eq!(world.node.room().sandboxes, 3);
    assert_eq!(world.node.room().vcpus, 6);
    world.node.close(Close::KillAll).await;
}

#[tokio::test]
async fn requests_that_come_together_do_not_share_a_place() {
    let world = bounded(Admission {
        sandboxes_max: 4,
        ..Admission::default()
    })
    .await;
    let asked = (0..12).map(|_| world.node.fork(ForkRequest::new(tag("base"), 1)));
    let outcomes = futures_util::future::join_all(asked).await;
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (4, 8));
    for error in refused {
        assert_eq!(error.unwrap_err().code(), ErrorCode::Busy);
    }
    assert_eq!(world.node.room().refused, [8, 0, 0, 0]);
    world.node.close(Close::KillAll).await;
}

#[tokio::test]
async fn virtual_cpus_are_counted_after_a_restart_too() {
    let cpus = std::thread::available_parallelism().unwrap().get();
    let bounds = Admission {
        vcpus_per_cpu: Some(4),
        ..Admission::default()
    };
    let world = bounded(bounds).await;
    let most = u32::try_from(4 * cpus / 2).unwrap();
    world.fork("base", most).await;
    let error = refused(&world.node, 1).await;
    assert_eq!(error.code(), ErrorCode::Busy);
    assert!(error.remedy().unwrap().contains("--max-vcpus-per-cpu"));
    let room = world.node.room();
    assert_eq!(Some(room.vcpus), room.vcpus_max);
    assert_eq!(room.vcpus, 2 * u64::from(most));
    world.node.close(Close::KillAll).await;
    // What was refused left no record and no directory.
    assert!(world.run_files().is_empty());
}

#[tokio::test]
async fn a_node_that_must_enforce_limits_refuses_those_it_cannot() {
    let isolation = Isolation {
        required: true,
        ..Isolation::OFF
    };
    let world = World::with_base(FakeConfig::default()).await;
    let World { dir, node } = world;
    node.close(Close::Leave).await;
    drop(node);
    let node = loop {
        match open_with(dir.path(), FakeConfig::default(), isolation.clone()).await {
            Ok((node, _)) => break node,
            Err(e) => assert_eq!(e.code(), ErrorCode::InUse, "{}", e.chain()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    };
    let limited = ForkRequest {
        memory_limit_mib: Some(128),
        io_limit: IoLimit {
            writes: Some(10),
            ..IoLimit::default()
        },
        ..ForkRequest::new(tag("base"), 1)
    };
    let error = node.fork(limited).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Incompatible);
    let said = error.to_string();
    assert!(said.contains("memory_limit_mib, io_limit"), "{said}");
    node.fork(ForkRequest::new(tag("base"), 1)).await.unwrap();
    node.close(Close::KillAll).await;
}

#[tokio::test]
async fn memory_and_disk_keep_their_reserve() {
    let out_of_memory = bounded(Admission {
        memory_reserve_mib: u64::MAX,
        ..Admission::default()
    })
    .await;
    let error = refused(&out_of_memory.node, 1).await;
    assert_eq!(error.code(), ErrorCode::InsufficientResources);
    let said = error.to_string();
    assert!(
        said.contains("1 MiB of memory are needed over a reserve"),
        "{said}"
    );
    let snapshot = out_of_memory
        .node
        .create_snapshot(out_of_memory.request("other"), None)
        .await
        .unwrap_err();
    assert_eq!(snapshot.code(), ErrorCode::InsufficientResources);
    assert!(out_of_memory.leftovers().is_empty());
    assert_eq!(out_of_memory.node.room().refused, [0, 0, 0, 2]);
    out_of_memory.node.close(Close::KillAll).await;
}
