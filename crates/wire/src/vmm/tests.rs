//! Every message survives the wire; nothing malformed does.

use super::*;

fn failure(message: &str) -> Failure {
    Failure {
        errno: 28,
        message: message.to_owned(),
    }
}

fn requests() -> Vec<Request> {
    let child = |id: &str, user, fds| Child {
        id: id.to_owned(),
        user,
        paused: user.is_some(),
        fds,
    };
    vec![
        Request::Fork {
            children: vec![
                child("sb-1", None, FdSet::CONTROL),
                child("sb-2", Some((1000, 1001)), FdSet::CONTROL.with(FdSet::TAP)),
            ],
        },
        Request::Write,
        Request::Pause,
        Request::Resume,
        Request::Branch { stay_paused: true },
        Request::Save,
        Request::Status,
        Request::Stop,
        Request::Guest {
            op: 2,
            args: [1, 2, u32::MAX],
        },
    ]
}

fn replies() -> Vec<Reply> {
    vec![
        Reply::Ready {
            memory_mib: 512,
            vcpus: 2,
            load_us: 77,
            privileged: true,
        },
        Reply::Failed(failure("state file is damaged")),
        Reply::Forked(vec![Ok(12), Err(failure("clone")), Ok(13)]),
        Reply::Running(Stages {
            clone_ns: 1,
            enter_ns: 7,
            ..Stages::default()
        }),
        Reply::Paused { pause_us: 3 },
        Reply::Resumed,
        Reply::Branched {
            pid: 4,
            pause_us: 600,
            quiesce_us: 100,
            state_us: 200,
            fork_us: 300,
            base: "base".to_owned(),
        },
        Reply::Written {
            data_bytes: 1 << 40,
            zero_bytes: 4096,
            extents: 9,
            state_hash: [7; 32],
            took_ms: 1,
        },
        Reply::Status {
            state: State::Writing,
            forks: 3,
            write_error: "no space".to_owned(),
        },
        Reply::Report(u64::MAX),
        Reply::Exiting {
            exit: Exit::Crash,
            message: "triple fault".to_owned(),
        },
        Reply::Error(failure("not paused")),
    ]
}

#[test]
fn requests_survive_the_wire() {
    for request in requests() {
        assert_eq!(Request::decode(&request.encode(9)), Ok((9, request)));
    }
}

#[test]
fn replies_survive_the_wire() {
    for reply in replies() {
        assert_eq!(Reply::decode(&reply.encode(9)), Ok((9, reply)));
    }
}

#[test]
fn every_cut_and_every_extra_byte_is_refused() {
    for packet in requests().iter().map(|r| r.encode(1)) {
        for len in 0..packet.len() {
            assert!(Request::decode(&packet[..len]).is_err());
        }
        let longer = [&packet[..], &[0]].concat();
        assert_eq!(Request::decode(&longer), Err(Error::Trailing(1)));
    }
    for packet in replies().iter().map(|r| r.encode(1)) {
        for len in 0..packet.len() {
            assert!(Reply::decode(&packet[..len]).is_err());
        }
    }
}

#[test]
fn a_changed_byte_never_panics() {
    for packet in requests().iter().map(|r| r.encode(1)) {
        for at in 0..packet.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = packet.clone();
                changed[at] = value;
                _ = Request::decode(&changed);
                _ = Reply::decode(&changed);
            }
        }
    }
}

#[test]
fn the_largest_fork_and_its_answer_fit_a_packet() {
    let child = Child {
        id: "x".repeat(ID_MAX),
        user: Some((1, 2)),
        paused: false,
        fds: FdSet::CONTROL
            .with(FdSet::CGROUP)
            .with(FdSet::TAP)
            .with(FdSet::VSOCK)
            .with(FdSet::CONSOLE),
    };
    let request = Request::Fork {
        children: vec![child; FORK_MAX],
    };
    let packet = request.encode(1);
    assert!(packet.len() <= PACKET_MAX);
    assert_eq!(Request::decode(&packet), Ok((1, request)));

    let answer = Reply::Forked(vec![Err(failure(&"e".repeat(9000))); FORK_MAX]).encode(1);
    assert!(answer.len() <= PACKET_MAX, "{}", answer.len());
    assert!(Reply::decode(&answer).is_ok());
}

#[test]
fn another_version_is_named() {
    let mut packet = Request::Stop.encode(1);
    packet[0] = 2;
    assert_eq!(Request::decode(&packet), Err(Error::Version(2)));
}
