//! Branches that can be forked before they are written.

use std::sync::Arc;

use super::{Frozen, MARK, MARK_CONTENT, World};
use crate::{SaveReport, SnapshotFiles, Template, Vm};

/// How many branches lie over each other.
const DEPTH: usize = 3;

/// A branch of a branch of a branch, each forked while nothing of it is on disk; then all are written,
/// and what is on disk is the same.
pub(super) async fn a_branch_is_forked_before_it_is_written(world: &World, frozen: &Frozen) {
    if !world.engine.capabilities().branch_writes_behind {
        return;
    }
    let base = world.template(frozen.files.clone()).await;
    let base = base.expect("template");
    let (mut from, mut branches) = (Arc::clone(&base), Vec::new());
    for depth in 0..DEPTH {
        let vm = world.fork_one(&from).await;
        let agent = world.agent(&vm).await;
        agent.write(&name(depth), &content(depth)).await;
        let (spec, files) = world.behind();
        let (memory, state) = (files.memory.clone(), spec.state.clone());
        let branch = vm.branch().await.expect("branch");
        eprintln!("{}: branch pause {:?}", world.engine.name(), branch.pause);
        assert!(
            !memory.exists() && !state.exists(),
            "written before it was asked"
        );
        assert!(branch.base.starts_with("template"), "{}", branch.base);
        // The connection survives, and what comes after is not in the branch.
        agent.write(MARK, b"after the branch").await;
        let fork = world.fork_one(&branch.template).await;
        assert_holds(world, &fork, depth + 1).await;
        fork.kill().await.expect("kill");
        vm.kill().await.expect("kill");
        from = Arc::clone(&branch.template);
        let mut layered = frozen.files.clone();
        layered.layers.push(files);
        layered.state = state;
        branches.push((branch, spec, layered));
    }
    let bases: Vec<String> = branches.iter().map(|(b, ..)| b.base.clone()).collect();
    assert!(bases.iter().all(|id| *id == bases[0]), "{bases:?}");
    for (depth, (branch, spec, layered)) in branches.into_iter().enumerate() {
        let memory_bytes = branch.template.write(spec).await.expect("write");
        let pause = branch.pause;
        let report = SaveReport {
            pause,
            memory_bytes,
        };
        world.note("wrote a branch behind", &report);
        assert!(
            memory_bytes < world.machine.memory_mib << 19,
            "everything was written"
        );
        assert_template(world, &branch.template, depth + 1).await;
        branch.template.close().await.expect("close");
        assert_loads(world, layered, depth + 1).await;
    }
    base.close().await.expect("close");
}

/// A branch lives on without the sandbox and the template it came from, and where it cannot be written; it
/// is written when it can be.
pub(super) async fn a_branch_outlives_its_sandbox_and_a_failed_write(
    world: &World,
    frozen: &Frozen,
) {
    if !world.engine.capabilities().branch_writes_behind {
        return;
    }
    let template = world.template(frozen.files.clone()).await;
    let template = template.expect("template");
    let vm = world.fork_one(&template).await;
    let agent = world.agent(&vm).await;
    agent.write(&name(0), &content(0)).await;
    vm.pause().await.expect("pause");
    let (spec, files) = world.behind();
    let state = spec.state.clone();
    let branch = vm.branch().await.expect("branch a paused VM");
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
    // A file is in the way.
    std::fs::write(&files.memory, "precious").unwrap();
    let written = branch.template.write(spec.clone()).await;
    written.expect_err("the file exists");
    assert_eq!(std::fs::read(&files.memory).unwrap(), b"precious");
    assert!(!files.index.exists() && !state.exists(), "half a snapshot");
    assert!(branch.template.is_alive());
    assert_template(world, &branch.template, 1).await;
    // Out of the way, it can be written after all, without the sandbox.
    std::fs::remove_file(&files.memory).unwrap();
    branch.template.write(spec).await.expect("write again");
    assert_template(world, &branch.template, 1).await;
    branch.template.close().await.expect("close");
    branch.template.close().await.expect("close again");
    let mut layered = frozen.files.clone();
    layered.layers.push(files);
    layered.state = state;
    assert_loads(world, layered, 1).await;
}

async fn assert_loads(world: &World, files: SnapshotFiles, levels: usize) {
    let template = world.template(files).await.expect("template");
    assert_template(world, &template, levels).await;
    template.close().await.expect("close");
}

async fn assert_template(world: &World, template: &Arc<dyn Template>, levels: usize) {
    let fork = world.fork_one(template).await;
    assert_holds(world, &fork, levels).await;
    fork.kill().await.expect("kill");
}

async fn assert_holds(world: &World, vm: &Arc<dyn Vm>, levels: usize) {
    let agent = world.agent(vm).await;
    assert_eq!(agent.read(MARK).await.as_deref(), Some(MARK_CONTENT));
    for level in 0..levels {
        let found = agent.read(&name(level)).await;
        assert!(found == Some(content(level)), "level {level} of {levels}");
    }
    assert_eq!(agent.read(&name(levels)).await, None);
}

fn name(level: usize) -> String {
    format!("/tmp/behind{level}")
}

fn content(level: usize) -> Vec<u8> {
    (0..200_000_usize)
        .map(|i| (i * (level + 5) / 11) as u8)
        .collect()
}
