//! Branching a machine that runs.

use forkd_vmm::guest::{COUNT, COUNTER, FILL, HALT, READ, SUM};
use forkd_wire::vmm::{Reply, Request, State};

use crate::support::{World, eventually, filled, load};

#[test]
fn the_copy_is_frozen_and_the_original_runs_on() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, base) = world.template();
    let mut sandbox = template.fork_one().unwrap();
    sandbox.run(FILL, [1024, 200, 3]).unwrap();
    sandbox.command(COUNT, [0; 3]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mut branch = sandbox.branch().unwrap();
    // The original counts on; its next command ends the counting.
    let at_branch = sandbox.run(READ, [COUNTER, 0, 0]).unwrap();
    sandbox.run(FILL, [1024, 200, 900]).unwrap();

    let mut copy = branch.template.fork_one_counting();
    let copied = copy.run(READ, [COUNTER, 0, 0]).unwrap();
    assert!(copied > 0, "the copy was frozen while counting");
    assert_eq!(copy.run(SUM, [1024, 200, 0]).unwrap(), filled(3, 200));
    assert_eq!(sandbox.run(SUM, [1024, 200, 0]).unwrap(), filled(900, 200));
    assert!(at_branch > 0);

    let directory = world.directory("branch");
    let (files, _) = branch.template.write(&Request::Write, &directory).unwrap();
    let counter = counter_in(&files);
    let mut loaded = load("branch", &[base, files]).fork_one_counting();
    assert_eq!(loaded.run(SUM, [1024, 200, 0]).unwrap(), filled(3, 200));
    let now = loaded.run(READ, [COUNTER, 0, 0]).unwrap();
    assert!(now >= u64::from(counter), "{now} goes on from {counter}");
}

fn counter_in(files: &forkd_vmm::client::SnapshotFiles) -> u32 {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 4];
    let file = std::fs::File::open(&files.memory).unwrap();
    file.read_exact_at(&mut bytes, u64::from(COUNTER)).unwrap();
    u32::from_le_bytes(bytes)
}

/// Forks of a machine that was frozen in the middle of counting say nothing before a command comes.
trait ForkCounting {
    fn fork_one_counting(&mut self) -> forkd_vmm::client::Process;
}

impl ForkCounting for forkd_vmm::client::Process {
    fn fork_one_counting(&mut self) -> forkd_vmm::client::Process {
        let mut child = self.fork(1, false).unwrap().remove(0);
        child.running().unwrap();
        // Any command ends the counting; the first look at the mailbox announces the guest.
        child.command(READ, [0x1000, 0, 0]).unwrap();
        child.alive().unwrap();
        child.report().unwrap();
        child
    }
}

#[test]
fn a_branch_of_a_branch_of_a_branch() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (template, _) = world.template();
    let mut templates = vec![template];
    for depth in 0..4u32 {
        let mut sandbox = templates.last_mut().unwrap().fork_one().unwrap();
        for earlier in 0..depth {
            let sum = sandbox.run(SUM, [4000 + 20 * earlier, 20, 0]).unwrap();
            assert_eq!(sum, filled(1000 * earlier + 1, 20));
        }
        sandbox
            .run(FILL, [4000 + 20 * depth, 20, 1000 * depth + 1])
            .unwrap();
        let branch = sandbox.branch().unwrap();
        assert_eq!(
            branch.base, "base",
            "file-backed pages are still the first snapshot's"
        );
        templates.push(branch.template);
        // The sandbox dies; the branch does not need it.
        drop(sandbox);
    }
    let directory = world.directory("deep");
    templates
        .last_mut()
        .unwrap()
        .write(&Request::Write, &directory)
        .unwrap();
}

#[test]
fn a_branch_sheds_the_vm_of_its_sandbox() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    let mut sandbox = template.fork_one().unwrap();
    let mut branch = sandbox.branch().unwrap();
    // It says that it is ready once it has shed everything.
    branch.template.next().unwrap();
    let entries = std::fs::read_dir(format!("/proc/{}/fd", branch.template.pid())).unwrap();
    for entry in entries {
        let Ok(target) = std::fs::read_link(entry.unwrap().path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        assert!(!target.contains("kvm-v"), "{target}");
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", branch.template.pid())).unwrap();
    assert!(!maps.contains("kvm-vcpu"), "{maps}");
}

#[test]
fn a_halted_machine_can_be_paused_and_branched() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.parent.command(HALT, [0; 3]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(matches!(
        world.parent.ask(&Request::Pause),
        Ok(Reply::Paused { .. })
    ));
    assert!(matches!(
        world.parent.ask(&Request::Pause),
        Ok(Reply::Paused { .. })
    ));
    let mut branch = world.parent.branch().unwrap();
    let mut child = branch.template.fork(1, false).unwrap().remove(0);
    child.running().unwrap();
    assert!(matches!(
        child.ask(&Request::Pause),
        Ok(Reply::Paused { .. })
    ));
    assert_eq!(world.parent.ask(&Request::Resume).unwrap(), Reply::Resumed);
}

#[test]
fn a_written_branch_says_so_and_can_be_written_again() {
    let Some(mut world) = World::new() else {
        return;
    };
    let mut branch = world.parent.branch().unwrap();
    let state = |process: &mut forkd_vmm::client::Process| match process.ask(&Request::Status) {
        Ok(Reply::Status { state, .. }) => state,
        other => panic!("{other:?}"),
    };
    assert_eq!(state(&mut branch.template), State::Memory);
    let directory = world.directory("written");
    let (files, _) = branch.template.write(&Request::Write, &directory).unwrap();
    let template = std::cell::RefCell::new(branch.template);
    eventually("ready", || {
        state(&mut template.borrow_mut()) == State::Ready
    });
    // What was written may be lost before it is published.
    let directory = world.directory("again");
    let again = template.borrow_mut().write(&Request::Write, &directory);
    let read = |path| std::fs::read(path).unwrap();
    assert!(read(again.unwrap().0.memory) == read(files.memory.clone()));
    // One that was loaded is on disk as it is.
    let mut loaded = load("written", &[files]);
    let directory = world.directory("loaded");
    let refused = loaded.write(&Request::Write, &directory).unwrap_err();
    assert!(refused.to_string().contains("loaded"), "{refused}");
}
