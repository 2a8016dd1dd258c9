//! Forking: content, isolation, descriptors, numbers.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use forkd_vmm::client::Process;
use forkd_vmm::guest::{COUNTER, CRASH, FILL, READ, SUM};
use forkd_wire::vmm::{Exit, Reply, Request};

use crate::support::{World, eventually, filled, kvm, load, program};

#[test]
fn children_inherit_memory_and_do_not_see_each_other() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.parent.run(FILL, [1024, 500, 7]).unwrap();
    let (mut template, _) = world.template();
    let mut children = template.fork(8, false).unwrap();
    for (number, child) in (0..).zip(&mut children) {
        child.alive().unwrap();
        assert_eq!(child.run(SUM, [1024, 500, 0]).unwrap(), filled(7, 500));
        assert_eq!(
            child.run(FILL, [1024, 300, 1000 * (number + 1)]).unwrap(),
            0
        );
    }
    for (number, child) in (0..).zip(&mut children) {
        let expected = filled(1000 * (number + 1), 300);
        assert_eq!(child.run(SUM, [1024, 300, 0]).unwrap(), expected);
        assert_eq!(child.run(SUM, [1324, 200, 0]).unwrap(), filled(307, 200));
    }
    let mut late = template.fork_one().unwrap();
    assert_eq!(late.run(SUM, [1024, 500, 0]).unwrap(), filled(7, 500));
    assert_eq!(
        world.parent.run(SUM, [1024, 500, 0]).unwrap(),
        filled(7, 500)
    );
}

#[test]
fn eight_layers_compose_by_content() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.parent.run(FILL, [2000, 800, 5]).unwrap();
    let (mut template, base) = world.template();
    let mut layers = vec![base];
    for depth in 1..=8u32 {
        let mut sandbox = template.fork_one().unwrap();
        sandbox
            .run(FILL, [2000 + 50 * depth, 100, 10_000 * depth])
            .unwrap();
        let mut branch = sandbox.branch().unwrap();
        let directory = world.directory(&format!("layer-{depth}"));
        let (files, written) = branch.template.write(&Request::Write, &directory).unwrap();
        let Reply::Written { data_bytes, .. } = written else {
            panic!("{written:?}")
        };
        assert!(
            data_bytes < 150 * 4096,
            "only what differs is written: {data_bytes}"
        );
        layers.push(files);
        template = load(&format!("layer-{depth}"), &layers);
        assert_eq!(
            branch.base,
            if depth == 1 {
                "base".into()
            } else {
                format!("layer-{}", depth - 1)
            }
        );
    }
    let mut sandbox = template.fork_one().unwrap();
    for page in 0..800u32 {
        // The highest layer that wrote a page wins; it wrote pages 50*d .. 50*d+100.
        let depth = (1..=8)
            .rev()
            .find(|d| (50 * d..50 * d + 100).contains(&page));
        let expected = depth.map_or(5 + page, |d| 10_000 * d + page - 50 * d);
        if page % 37 == 0 || page % 50 < 2 {
            let value = sandbox.run(READ, [(2000 + page) * 4096, 0, 0]).unwrap();
            assert_eq!(value, u64::from(expected), "page {page}");
        }
    }
}

#[test]
fn pages_that_became_zero_stay_zero() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.parent.run(FILL, [3000, 10, 1]).unwrap();
    let (mut template, base) = world.template();
    let mut sandbox = template.fork_one().unwrap();
    // Page 3002 is filled with -1, so that page 3003 becomes 0.
    sandbox.run(FILL, [3002, 2, u32::MAX]).unwrap();
    let mut branch = sandbox.branch().unwrap();
    let directory = world.directory("zero");
    let (files, written) = branch.template.write(&Request::Write, &directory).unwrap();
    let Reply::Written { zero_bytes, .. } = written else {
        panic!("{written:?}")
    };
    assert_eq!(zero_bytes, 4096);
    let mut again = load("zero", &[base, files]).fork_one().unwrap();
    assert_eq!(again.run(READ, [3003 * 4096, 0, 0]).unwrap(), 0);
    assert_eq!(
        again.run(READ, [3002 * 4096, 0, 0]).unwrap(),
        u64::from(u32::MAX)
    );
    assert_eq!(again.run(READ, [3001 * 4096, 0, 0]).unwrap(), 2);
}

#[test]
fn a_saved_sandbox_stands_alone() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.parent.run(FILL, [2000, 50, 9]).unwrap();
    let (mut template, _) = world.template();
    let mut sandbox = template.fork_one().unwrap();
    sandbox.run(FILL, [2010, 5, 777]).unwrap();
    assert!(
        sandbox
            .write(&Request::Save, &world.directory("early"))
            .is_err(),
        "not paused"
    );
    sandbox.ask(&Request::Pause).unwrap();
    let (files, _) = sandbox
        .write(&Request::Save, &world.directory("saved"))
        .unwrap();
    assert_eq!(sandbox.ask(&Request::Resume).unwrap(), Reply::Resumed);
    let mut alone = load("saved", &[files]).fork_one().unwrap();
    for process in [&mut sandbox, &mut alone] {
        assert_eq!(process.run(SUM, [2000, 10, 0]).unwrap(), filled(9, 10));
        assert_eq!(process.run(SUM, [2010, 5, 0]).unwrap(), filled(777, 5));
    }
}

#[test]
fn a_child_forked_paused_waits() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    let mut child = template.fork(1, true).unwrap().remove(0);
    child.running().unwrap();
    // Nothing of the guest comes before the answer.
    child.send(&Request::Status, &[]).unwrap();
    let status = child.next().unwrap().1;
    assert!(matches!(
        status,
        Reply::Status {
            state: forkd_wire::vmm::State::Paused,
            ..
        }
    ));
    // The guest's first word and the answer to the request may come in either order.
    child.send(&Request::Resume, &[]).unwrap();
    child.alive().unwrap();
    assert_eq!(child.run(READ, [COUNTER, 0, 0]).unwrap(), 0);
}

#[test]
fn memory_up_to_the_device_hole_survives_branch_files_and_fork() {
    const LAST: u32 = 3 << 18;
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut parent = Process::boot_test_guest(program(), 4096, &[]).unwrap();
    parent.run(FILL, [LAST - 40, 40, 11]).unwrap();
    parent.run(FILL, [1 << 18, 40, 22]).unwrap();
    // In the hole there is nothing: what is written is lost, what is read has every bit set.
    parent.run(FILL, [LAST, 1, 33]).unwrap();
    let hole = parent.run(READ, [LAST << 12, 0, 0]).unwrap();
    assert_eq!(hole, u64::from(u32::MAX));
    let mut branch = parent.branch().unwrap();
    let (files, _) = branch
        .template
        .write(&Request::Write, directory.path())
        .unwrap();
    let mut loaded = load("large", &[files]);
    for template in [&mut branch.template, &mut loaded] {
        let mut copy = template.fork_one().unwrap();
        let top = copy.run(SUM, [LAST - 40, 40, 0]).unwrap();
        assert_eq!(top, filled(11, 40));
        assert_eq!(copy.run(SUM, [1 << 18, 40, 0]).unwrap(), filled(22, 40));
    }
}

#[test]
fn a_crash_is_told_and_ends_only_its_sandbox() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    let (mut one, mut other) = (template.fork_one().unwrap(), template.fork_one().unwrap());
    one.command(CRASH, [0; 3]).unwrap();
    let exiting = loop {
        if let (_, reply @ Reply::Exiting { .. }, _) = one.next().unwrap() {
            break reply;
        }
    };
    assert!(matches!(
        exiting,
        Reply::Exiting {
            exit: Exit::Crash,
            ..
        }
    ));
    assert_eq!(one.wait().unwrap().unwrap().exit_status(), Some(0));
    assert_eq!(other.run(READ, [COUNTER, 0, 0]).unwrap(), 0);
    assert!(
        other.ask(&Request::Stop).is_err(),
        "it ends instead of answering"
    );
    assert_eq!(other.wait().unwrap().unwrap().exit_status(), Some(0));
}

/// What the descriptors of a process refer to, without numbers that differ.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let name = |target: std::path::PathBuf| {
        let text = target.to_string_lossy().into_owned();
        text.split(":[").next().unwrap_or_default().to_owned()
    };
    let mut names: Vec<String> = targets.map(name).collect();
    names.sort();
    names
}

#[test]
fn a_child_holds_only_its_own_descriptors() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    let mut children = template.fork(20, false).unwrap();
    children.iter_mut().for_each(|child| child.alive().unwrap());
    let kinds: BTreeSet<Vec<String>> = children
        .iter()
        .map(|child| descriptors(child.pid()))
        .collect();
    assert_eq!(kinds.len(), 1, "every child holds the same: {kinds:?}");
    let held = kinds.into_iter().next().unwrap();
    let sockets = held.iter().filter(|name| *name == "socket").count();
    let standard = descriptors(template.pid())
        .iter()
        .filter(|n| *n == "socket")
        .count()
        - 1;
    assert_eq!(sockets, 1 + standard, "one control socket: {held:?}");
    assert_eq!(
        held.iter().filter(|name| name.contains("kvm-vm")).count(),
        1
    );
}

#[test]
fn two_thousand_forks_leak_nothing() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    drop(template.fork_one().unwrap());
    let mut before = None;
    for _ in 0..20 {
        let mut children = template.fork(100, false).unwrap();
        children.iter_mut().for_each(|child| child.alive().unwrap());
        let pids: Vec<u32> = children.iter().map(|child| child.pid()).collect();
        drop(children);
        let gone = |pid: &u32| !std::path::Path::new(&format!("/proc/{pid}")).exists();
        eventually("all children are gone", || pids.iter().all(gone));
        // From the first round on, the buffers for a round of this size are there.
        before.get_or_insert_with(|| (descriptors(template.pid()), memory_kib(template.pid())));
    }
    let before = before.unwrap();
    assert_eq!(descriptors(template.pid()), before.0);
    let grown = memory_kib(template.pid()).saturating_sub(before.1);
    println!("the template has {} KiB and grew by {grown}", before.1);
    assert!(grown < 64, "the template grew by {grown} KiB");
    assert!(matches!(
        template.ask(&Request::Status),
        Ok(Reply::Status { forks: 2001, .. })
    ));
}

/// Memory the process has of its own, shared with a dying child or not. What it merely mapped of its program counts
/// as shared or private by turns, as other tests run the same program.
fn memory_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let of = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    of("Anonymous:")
}

/// The largest machine there is: 256 GiB, of which nothing is there until it is touched. The test guest reaches the
/// lowest 3 GiB; that guests use what lies above 4 GiB is shown with Linux in the lab.
#[test]
fn a_machine_of_256_gib_forks_branches_and_is_written() {
    if !kvm() {
        return;
    }
    let mut parent = Process::boot_test_guest(program(), 256 * 1024, &[]).unwrap();
    let places = [1 << 10, 1 << 18, 3 * (1 << 18) - 10];
    for first in places {
        parent.run(FILL, [first, 10, first]).unwrap();
    }
    let mut branch = parent.branch().unwrap();
    drop(parent);
    let directory = tempfile::tempdir().unwrap();
    let (files, _) = branch
        .template
        .write(&Request::Write, directory.path())
        .unwrap();
    drop(branch);
    let mut fork = load("large", std::slice::from_ref(&files))
        .fork_one()
        .unwrap();
    for first in places {
        assert_eq!(fork.run(SUM, [first, 10, 0]).unwrap(), filled(first, 10));
    }
    let written = std::fs::metadata(&files.memory).unwrap();
    assert_eq!(written.len(), 256 << 30);
    assert!(written.blocks() * 512 < 4 << 20, "holes stay holes");
}
