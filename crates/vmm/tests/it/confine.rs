//! Privileges: given up in the child, and not regained by a branch.

use std::os::fd::AsFd;

use forkd_vmm::control::Channel;
use forkd_vmm::guest::ALIVE;
use forkd_wire::vmm::{Child, FdSet, Reply, Request};

use crate::support::World;

fn request(user: Option<(u32, u32)>) -> Request {
    Request::Fork {
        children: vec![Child {
            id: "confined".to_owned(),
            user,
            paused: false,
            fds: FdSet::CONTROL,
        }],
    }
}

#[test]
fn a_user_is_taken_for_good_and_a_branch_does_not_get_it_back() {
    let Some(mut world) = World::new() else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can give a child another user");
        return;
    }
    let (mut template, _) = world.template();
    let (ours, theirs) = Channel::pair().unwrap();
    let seq = template
        .send(&request(Some((4242, 4243))), &[theirs.as_fd()])
        .unwrap();
    let (reply, _pidfds) = template.answer(seq).unwrap();
    let Reply::Forked(children) = reply else {
        panic!("{reply:?}")
    };
    let pid = *children[0].as_ref().unwrap();
    drop(theirs);
    loop {
        match ours.next_reply().unwrap().unwrap().1 {
            Reply::Report(ALIVE) => break,
            Reply::Running(_) => {}
            other => panic!("{other:?}"),
        }
    }
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_once(':').unwrap().1.trim().replace('\t', " ")
        };
        if field("Name").starts_with("vhost") || field("Name").starts_with("kvm") {
            continue;
        }
        assert_eq!(field("Uid"), "4242 4242 4242 4242");
        assert_eq!(field("Gid"), "4243 4243 4243 4243");
        assert_eq!(field("CapEff"), "0000000000000000");
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(field("Seccomp"), "2");
    }

    let (branch, its_end) = Channel::pair().unwrap();
    let ask = Request::Branch { stay_paused: false };
    ours.request(1, &ask, &[its_end.as_fd()]).unwrap();
    drop(its_end);
    let ready = branch.next_reply().unwrap().unwrap().1;
    assert!(
        matches!(
            ready,
            Reply::Ready {
                privileged: false,
                ..
            }
        ),
        "{ready:?}"
    );
    let (_kept, child) = Channel::pair().unwrap();
    branch
        .request(2, &request(Some((0, 0))), &[child.as_fd()])
        .unwrap();
    let answer = branch.next_reply().unwrap().unwrap().1;
    let Reply::Forked(children) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(children[0].as_ref().unwrap_err().errno, libc::EPERM as u32);
}
