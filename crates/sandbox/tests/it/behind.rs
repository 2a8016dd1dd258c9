//! Branches that can be forked before they are written.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use forkd_engine::fake::FakeConfig;
use forkd_sandbox::spec::{BranchRequest, RemoveMode};
use forkd_sandbox::view::{Close, SandboxStatus, SnapshotStatus};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;

use crate::world::{PATIENCE, World, tag};

fn request(id: &SandboxId, name: &str, wait: bool) -> BranchRequest {
    BranchRequest {
        id: id.clone(),
        tag: Some(tag(name)),
        full: false,
        wait,
    }
}

fn slow(save_delay: Duration) -> FakeConfig {
    FakeConfig {
        write_behind: true,
        save_delay,
        ..FakeConfig::default()
    }
}

/// A world with a snapshot `base`, whose branches take this long to be written.
async fn world(save_delay: Duration) -> World {
    World::with_base(slow(Duration::ZERO))
        .await
        .reopen(slow(save_delay))
        .await
        .0
}

async fn status(world: &World, name: &str) -> (SnapshotStatus, bool) {
    let listed = world.node.snapshots().await.unwrap();
    let of_tag: Vec<_> = listed.iter().filter(|s| s.tag == tag(name)).collect();
    assert_eq!(of_tag.len(), 1, "{listed:?}");
    (of_tag[0].status, of_tag[0].bootable)
}

async fn until_ready(world: &World, name: &str) {
    until(world, name, SnapshotStatus::Ready).await;
}

async fn until(world: &World, name: &str, wanted: SnapshotStatus) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while status(world, name).await != (wanted, true) {
        assert!(
            tokio::time::Instant::now() < deadline,
            "{name} is never {wanted:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_branch_is_forked_and_branched_while_it_is_written() {
    let world = world(Duration::from_millis(600)).await;
    let id = world.one("base").await;
    world.eval(&id, "x = 1").await;
    let first = world
        .node
        .branch(request(&id, "first", false))
        .await
        .unwrap();
    assert_eq!(first.status, SnapshotStatus::Writing);
    assert!(first.bootable && first.layered && first.pause.is_some());
    assert_eq!(first.parent, Some(tag("base")));
    assert_eq!(
        status(&world, "first").await,
        (SnapshotStatus::Writing, true)
    );
    let child = world.one("first").await;
    assert_eq!(world.eval(&child, "x").await, Some("1".into()));
    world.eval(&child, "x = 2").await;
    let second = world
        .node
        .branch(request(&child, "second", false))
        .await
        .unwrap();
    assert_eq!(second.parent, Some(tag("first")));
    let grandchild = world.one("second").await;
    assert_eq!(world.eval(&grandchild, "x").await, Some("2".into()));
    for taken in ["first", "second"] {
        let error = world
            .node
            .branch(request(&id, taken, false))
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::AlreadyExists);
        let error = world.node.create_snapshot(world.request(taken), None).await;
        assert_eq!(error.unwrap_err().code(), ErrorCode::AlreadyExists);
    }
    until_ready(&world, "first").await;
    until_ready(&world, "second").await;
    // What is on disk is the same, and needs neither daemon nor sandbox.
    let (world, _) = world.reopen(slow(Duration::ZERO)).await;
    for (name, value) in [("first", "1"), ("second", "2")] {
        let id = world.one(name).await;
        assert_eq!(world.eval(&id, "x").await, Some(value.into()));
    }
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn who_waits_is_answered_when_it_is_on_disk() {
    let world = world(Duration::from_millis(200)).await;
    let id = world.one("base").await;
    world.eval(&id, "x = 5").await;
    let view = world
        .node
        .branch(request(&id, "layer", true))
        .await
        .unwrap();
    assert_eq!((view.status, view.layered), (SnapshotStatus::Ready, true));
    assert!(view.pause.is_some() && view.physical_bytes > 0);
    let full = BranchRequest {
        full: true,
        ..request(&id, "full", true)
    };
    let view = world.node.branch(full).await.unwrap();
    assert_eq!((view.status, view.layered), (SnapshotStatus::Ready, false));
    assert_eq!(view.parent, Some(tag("base")));
    world.node.kill(&id).await.unwrap();
    let (world, _) = world.reopen(slow(Duration::ZERO)).await;
    for name in ["layer", "full"] {
        let id = world.one(name).await;
        assert_eq!(world.eval(&id, "x").await, Some("5".into()));
    }
}

#[tokio::test]
async fn a_branch_that_cannot_be_written_stays_usable_and_says_so() {
    let world = world(Duration::ZERO).await;
    let failing = FakeConfig {
        fail_save: true,
        ..slow(Duration::from_millis(50))
    };
    let (world, _) = world.reopen(failing).await;
    let id = world.one("base").await;
    world.eval(&id, "x = 3").await;
    let error = world
        .node
        .branch(request(&id, "lost", true))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InsufficientResources);
    assert!(
        error
            .remedy()
            .is_some_and(|text| text.contains("forkd rmi lost")),
        "{error:?}"
    );
    assert_eq!(status(&world, "lost").await, (SnapshotStatus::Failed, true));
    let view = world.node.snapshot(&tag("lost")).await.unwrap();
    assert!(view.problem.is_some());
    // Nothing of it is on disk.
    assert!(world.leftovers().is_empty() && !view.dir.exists());
    let child = world.one("lost").await;
    assert_eq!(world.eval(&child, "x").await, Some("3".into()));
    let error = world
        .node
        .compact(&tag("lost"), &tag("flat"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotReady);
    // What it lies over must stay, as long as it is there.
    world.node.kill(&id).await.unwrap();
    let refused = world
        .node
        .remove_snapshot(&tag("base"), RemoveMode::Refuse)
        .await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::InUse);
    assert!(refused.to_string().contains("lost"), "{refused}");
    let refused = world
        .node
        .remove_snapshot(&tag("lost"), RemoveMode::Refuse)
        .await;
    assert_eq!(refused.unwrap_err().code(), ErrorCode::InUse);
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
async fn a_branch_is_removed_while_it_is_written() {
    let world = world(Duration::from_secs(60)).await;
    let id = world.one("base").await;
    world
        .node
        .branch(request(&id, "gone", false))
        .await
        .unwrap();
    world
        .node
        .remove_snapshot(&tag("gone"), RemoveMode::Refuse)
        .await
        .unwrap();
    assert_eq!(world.node.snapshots().await.unwrap().len(), 1);
    assert!(world.leftovers().is_empty());
    // Its name is free again.
    world
        .node
        .branch(request(&id, "gone", false))
        .await
        .unwrap();
    world
        .node
        .remove_snapshot(&tag("base"), RemoveMode::Cascade)
        .await
        .unwrap();
    assert!(world.node.snapshots().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_caller_who_goes_away_leaves_no_branch_he_does_not_know() {
    let world = world(Duration::from_secs(60)).await;
    let id = world.one("base").await;
    let branching = world.node.branch(request(&id, "mid", true));
    tokio::time::timeout(Duration::from_millis(300), branching)
        .await
        .expect_err("it takes a minute");
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while world.node.snapshots().await.unwrap().len() > 1 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the branch is still there"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(world.leftovers().is_empty());
    assert_eq!(world.eval(&id, "1").await, Some("1".into()));
}

#[tokio::test]
async fn the_end_of_the_daemon_waits_for_what_is_being_written() {
    for how in [Close::KillAll, Close::Leave] {
        let world = world(Duration::from_millis(300)).await;
        let id = world.one("base").await;
        world.eval(&id, "x = 8").await;
        world
            .node
            .branch(request(&id, "late", false))
            .await
            .unwrap();
        world.node.close(how).await;
        let (world, _) = world.reopen(slow(Duration::ZERO)).await;
        assert_eq!(status(&world, "late").await, (SnapshotStatus::Ready, true));
        let id = world.one("late").await;
        assert_eq!(world.eval(&id, "x").await, Some("8".into()));
    }
}

#[tokio::test]
async fn a_sandbox_killed_after_its_branch_takes_nothing_along() {
    let world = world(Duration::from_millis(300)).await;
    let id = world.one("base").await;
    world.eval(&id, "x = 4").await;
    world
        .node
        .branch(request(&id, "left", false))
        .await
        .unwrap();
    world.node.kill(&id).await.unwrap();
    let child = world.one("left").await;
    assert_eq!(world.eval(&child, "x").await, Some("4".into()));
    until_ready(&world, "left").await;
}

#[tokio::test]
async fn more_branches_than_are_written_at_once_are_all_forked_and_all_written() {
    let world = world(Duration::from_millis(200)).await;
    let id = world.one("base").await;
    for n in 0..9 {
        world.eval(&id, &format!("x = {n}")).await;
        let name = format!("b{n}");
        world.node.branch(request(&id, &name, false)).await.unwrap();
        let child = world.one(&name).await;
        assert_eq!(world.eval(&child, "x").await, Some(n.to_string()));
    }
    for n in 0..9 {
        until_ready(&world, &format!("b{n}")).await;
    }
    assert_eq!(world.node.sandbox(&id).unwrap().branches, 9);
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_branch_that_could_not_be_written_is_written_later() {
    let world = world(Duration::ZERO).await;
    let failing = FakeConfig {
        fail_writes: 1,
        ..slow(Duration::from_millis(200))
    };
    let (world, _) = world.reopen(failing).await;
    let id = world.one("base").await;
    world.eval(&id, "x = 6").await;
    world
        .node
        .branch(request(&id, "late", false))
        .await
        .unwrap();
    until(&world, "late", SnapshotStatus::Failed).await;
    assert!(world.leftovers().is_empty());
    let view = world.node.snapshot(&tag("late")).await.unwrap();
    assert!(view.problem.is_some() && !view.dir.exists());
    // Its name stays taken, and it goes on being forked.
    let taken = world.node.branch(request(&id, "late", false)).await;
    assert_eq!(taken.unwrap_err().code(), ErrorCode::AlreadyExists);
    let child = world.one("late").await;
    assert_eq!(world.eval(&child, "x").await, Some("6".into()));
    until(&world, "late", SnapshotStatus::Writing).await;
    until_ready(&world, "late").await;
    let written = world.node.snapshot(&tag("late")).await.unwrap();
    assert_eq!((written.id, written.problem), (view.id, None));
    let (world, _) = world.reopen(slow(Duration::ZERO)).await;
    let id = world.one("late").await;
    assert_eq!(world.eval(&id, "x").await, Some("6".into()));
}

#[tokio::test]
async fn a_branch_that_waits_to_be_written_again_is_removed_without_a_trace() {
    let world = world(Duration::ZERO).await;
    let failing = FakeConfig {
        fail_save: true,
        ..slow(Duration::ZERO)
    };
    let (world, _) = world.reopen(failing.clone()).await;
    let id = world.one("base").await;
    let one = tag("one");
    let removed = || world.node.remove_snapshot(&one, RemoveMode::Refuse);
    for name in ["one", "two"] {
        world.node.branch(request(&id, name, false)).await.unwrap();
        until(&world, name, SnapshotStatus::Failed).await;
    }
    removed().await.unwrap();
    world.node.branch(request(&id, "one", false)).await.unwrap();
    removed().await.unwrap();
    // The end of the daemon does not wait for the next attempt, and what is lost is not half there.
    let began = tokio::time::Instant::now();
    let (world, _) = world.reopen(failing).await;
    assert!(began.elapsed() < Duration::from_secs(10), "it waited");
    let left = world.node.snapshots().await.unwrap();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(world.leftovers().is_empty());
    let id = world.one("base").await;
    world.node.branch(request(&id, "two", false)).await.unwrap();
    until(&world, "two", SnapshotStatus::Failed).await;
    world.node.close(Close::KillAll).await;
    assert!(world.leftovers().is_empty() && world.run_files().is_empty());
}

/// A small file system of a test's own.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Option<Disk> {
        std::fs::create_dir(&at).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        // Little more than the heart leaves free and the base needs.
        let options = Some(c"size=340m");
        match rustix::mount::mount("forkd-test", &at, "tmpfs", flags, options) {
            Ok(()) => Some(Disk(at)),
            Err(error) => {
                eprintln!("skipped: cannot mount a small file system: {error}");
                None
            }
        }
    }

    /// Takes all that is free.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        for block in [1 << 20, 4096] {
            while file.write_all(&vec![1; block]).is_ok() {}
        }
    }

    fn filler(&self) -> PathBuf {
        self.0.join(".filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_branch_is_written_when_a_full_disk_has_space_again() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(dir.path().join("snapshots")) else {
        return;
    };
    // In this order the disk goes first.
    let (world, disk) = (World::inside(dir, slow(Duration::ZERO)).await, disk);
    world.make_base().await;
    let id = world.one("base").await;
    world.eval(&id, "x = 9").await;
    disk.fill();
    for full in [false, true] {
        let name = if full { "full" } else { "layer" };
        let request = BranchRequest {
            full,
            ..request(&id, name, true)
        };
        let error = world.node.branch(request).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InsufficientResources, "{error}");
        assert!(error.chain().contains("No space left"), "{}", error.chain());
        assert_eq!(status(&world, name).await, (SnapshotStatus::Failed, true));
    }
    // Not tried, while it cannot succeed.
    tokio::time::sleep(Duration::from_secs(3)).await;
    for name in ["layer", "full"] {
        assert_eq!(status(&world, name).await, (SnapshotStatus::Failed, true));
        let child = world.one(name).await;
        assert_eq!(world.eval(&child, "x").await, Some("9".into()));
    }
    std::fs::remove_file(disk.filler()).unwrap();
    for name in ["layer", "full"] {
        until_ready(&world, name).await;
    }
    assert!(world.leftovers().is_empty());
    let (world, _) = world.reopen(slow(Duration::ZERO)).await;
    for name in ["layer", "full"] {
        let id = world.one(name).await;
        assert_eq!(world.eval(&id, "x").await, Some("9".into()));
    }
    drop((disk, world));
}

/// Where templates of snapshots on disk have their files.
fn loaded(world: &World) -> usize {
    let templates = world.dir.path().join("snapshots/.templates");
    std::fs::read_dir(templates).map_or(0, Iterator::count)
}

#[tokio::test]
async fn forks_get_users_of_their_own_once_the_branch_is_written() {
    for (branches_keep_user, more) in [(true, 1), (false, 0)] {
        let world = world(Duration::ZERO).await;
        let config = FakeConfig {
            branches_keep_user,
            ..slow(Duration::from_millis(300))
        };
        let (world, _) = world.reopen(config).await;
        let id = world.one("base").await;
        world.eval(&id, "x = 7").await;
        world.node.branch(request(&id, "mid", false)).await.unwrap();
        let before = loaded(&world);
        let early = world.one("mid").await;
        assert_eq!(loaded(&world), before, "it was not written yet");
        until_ready(&world, "mid").await;
        let late = world.one("mid").await;
        assert_eq!(loaded(&world), before + more);
        for id in [early, late] {
            assert_eq!(world.eval(&id, "x").await, Some("7".into()));
        }
        world
            .node
            .remove_snapshot(&tag("mid"), RemoveMode::Cascade)
            .await
            .unwrap();
        assert_eq!(loaded(&world), before);
    }
}

#[tokio::test]
async fn a_long_line_of_branches_does_not_end_at_the_deepest_layer() {
    let world = world(Duration::ZERO).await;
    let config = FakeConfig {
        branches_keep_user: true,
        ..slow(Duration::ZERO)
    };
    let (world, _) = world.reopen(config).await;
    let mut id = world.one("base").await;
    let mut whole = 0;
    for depth in 0..70 {
        world.eval(&id, &format!("x = {depth}")).await;
        let name = format!("b{depth}");
        let view = world.node.branch(request(&id, &name, true)).await.unwrap();
        whole += usize::from(!view.layered);
        world.node.kill(&id).await.unwrap();
        id = world.one(&name).await;
        assert_eq!(world.eval(&id, "x").await, Some(depth.to_string()));
    }
    assert_eq!(whole, 2);
}
