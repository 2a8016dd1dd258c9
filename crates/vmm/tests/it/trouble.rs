//! Things that die or run out in the middle.

use forkd_vmm::client::{Error, Process};
use forkd_vmm::guest::{FILL, FORBIDDEN, READ, SUM};
use forkd_wire::vmm::{Reply, Request, State};

use crate::support::{World, eventually, filled, load};

#[test]
fn a_forbidden_system_call_kills_only_its_sandbox() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    let (mut one, mut other) = (template.fork_one().unwrap(), template.fork_one().unwrap());
    one.command(FORBIDDEN, [0; 3]).unwrap();
    let status = one.wait().unwrap().unwrap();
    assert_eq!(status.terminating_signal(), Some(libc::SIGSYS));
    assert_eq!(other.run(READ, [0x2000, 0, 0]).unwrap(), 0);
    template.fork_one().unwrap();
}

#[test]
fn a_template_killed_while_forking_leaves_whole_children_or_none() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, files) = world.template();
    let mut survivors = template.fork(3, false).unwrap();
    // The request is on its way when the template dies.
    let pairs: Vec<_> = (0..40)
        .map(|_| forkd_vmm::control::Channel::pair().unwrap())
        .collect();
    let child = |number| forkd_wire::vmm::Child {
        id: format!("child-{number}"),
        user: None,
        paused: false,
        fds: forkd_wire::vmm::FdSet::CONTROL,
    };
    let children = (0..40).map(child).collect();
    {
        use std::os::fd::AsFd;
        let fds: Vec<_> = pairs.iter().map(|(_, theirs)| theirs.as_fd()).collect();
        template.send(&Request::Fork { children }, &fds).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_millis(2));
    template.kill();
    template.wait().unwrap();
    // Each new child either runs, or its socket closes; closing ours ends those that run.
    for (ours, theirs) in pairs {
        drop(theirs);
        match ours.next_reply() {
            Ok(Some((_, Reply::Running(_) | Reply::Report(_), _)) | None) => {}
            other => panic!("{other:?}"),
        }
    }
    for child in &mut survivors {
        child.alive().unwrap();
        assert_eq!(child.run(READ, [0x2000, 0, 0]).unwrap(), 0);
    }
    reap_strays();
    load("again", &[files]).fork_one().unwrap();
}

/// Children of the killed template that were never answered for are still ours to reap.
fn reap_strays() {
    let me = std::process::id().to_string();
    let named = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = stat.rsplit(") ").next().unwrap_or_default().to_owned();
        let parent = after.split_whitespace().nth(1).unwrap_or_default() == me;
        parent && stat.contains("(vm:child-")
    };
    for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.bytes().all(|byte| byte.is_ascii_digit()) && named(&name) {
            let pid = rustix::process::Pid::from_raw(name.parse().unwrap());
            _ = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
        }
    }
}

#[test]
fn a_sandbox_killed_while_branching_takes_nothing_with_it() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    for delay_us in [0, 300, 900, 2000] {
        let mut sandbox = template.fork_one().unwrap();
        sandbox.run(FILL, [1024, 400, 1]).unwrap();
        let (ours, theirs) = forkd_vmm::control::Channel::pair().unwrap();
        use std::os::fd::AsFd;
        let request = Request::Branch { stay_paused: false };
        sandbox.send(&request, &[theirs.as_fd()]).unwrap();
        drop(theirs);
        std::thread::sleep(std::time::Duration::from_micros(delay_us));
        sandbox.kill();
        // The new template exists and is whole, or it never came to be.
        match ours.next_reply().unwrap() {
            Some((_, Reply::Ready { memory_mib, .. }, _)) => assert_eq!(memory_mib, 64),
            None => {}
            other => panic!("{other:?}"),
        }
        sandbox.wait().unwrap();
    }
    template.fork_one().unwrap();
}

/// A small file system of its own, unmounted at the end.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: std::path::PathBuf) -> Option<SmallDisk> {
        use rustix::mount::{MountFlags, mount};
        match mount(
            "small",
            &path,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=256k"),
        ) {
            Ok(()) => Some(SmallDisk(path)),
            Err(error) => {
                println!("skipped: cannot mount a small disk: {error}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_leaves_the_branch_usable_in_memory() {
    let Some(mut world) = World::new() else {
        return;
    };
    let Some(disk) = SmallDisk::mount(world.directory("small")) else {
        return;
    };
    let (mut template, base) = world.template();
    let mut sandbox = template.fork_one().unwrap();
    sandbox.run(FILL, [1024, 500, 4]).unwrap();
    let mut branch = sandbox.branch().unwrap();
    match branch.template.write(&Request::Write, &disk.0) {
        Err(Error::Refused(failure)) => {
            assert_eq!(failure.errno, libc::ENOSPC as u32);
            assert!(
                failure.message.contains("stays usable"),
                "{}",
                failure.message
            );
        }
        other => panic!("{other:?}"),
    }
    let status = |process: &mut Process| match process.ask(&Request::Status).unwrap() {
        Reply::Status {
            state, write_error, ..
        } => (state, write_error),
        other => panic!("{other:?}"),
    };
    let cell = std::cell::RefCell::new(branch.template);
    eventually("the failure is known", || {
        status(&mut cell.borrow_mut()).0 == State::Memory
    });
    let mut template = cell.into_inner();
    assert!(status(&mut template).1.contains("No space left"));
    let mut child = template.fork_one().unwrap();
    assert_eq!(child.run(SUM, [1024, 500, 0]).unwrap(), filled(4, 500));
    // With space it works at the second attempt.
    let (files, _) = template
        .write(&Request::Write, &world.directory("large"))
        .unwrap();
    let mut loaded = load("large", &[base, files]).fork_one().unwrap();
    assert_eq!(loaded.run(SUM, [1024, 500, 0]).unwrap(), filled(4, 500));
}

#[test]
fn a_controller_that_goes_away_ends_its_processes() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (mut template, _) = world.template();
    let child = template.fork_one().unwrap();
    let pid = child.pid();
    let (ours, theirs) = forkd_vmm::control::Channel::pair().unwrap();
    drop((ours, theirs));
    drop(child);
    let gone = || !std::path::Path::new(&format!("/proc/{pid}")).exists();
    eventually("the sandbox is gone", gone);
}
