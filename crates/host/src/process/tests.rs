//! Real processes: `sleep`, `sh`, `true`.

mod jail;
mod lent;
mod sys;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::stat::{Status, parse_memory, parse_status};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

fn sh(script: &str) -> Spawn {
    Spawn::new("sh", vec!["-c".into(), script.into()])
}

fn ended(process: &Process) -> Exit {
    process.wait_for(PATIENCE).unwrap().expect("ended in time")
}

#[test]
fn says_how_a_process_ended() {
    assert_eq!(ended(&Process::spawn(sh("exit 7")).unwrap()), Exit::Code(7));
    let sleeper = Process::spawn(sh("exec sleep 100")).unwrap();
    assert_eq!(sleeper.try_wait().unwrap(), None);
    sleeper.kill().unwrap();
    assert_eq!(ended(&sleeper), Exit::Signal(9));
    // Idempotent, and honest about what can no longer be known.
    sleeper.kill().unwrap();
    assert_eq!(sleeper.try_wait().unwrap(), Some(Exit::Unknown));
}

#[test]
fn a_missing_program_is_named() {
    let error = Process::spawn(Spawn::new("no-such-program", vec![])).unwrap_err();
    assert_eq!(error.to_string(), "cannot start no-such-program");
    assert_eq!(error.io().unwrap().kind(), io::ErrorKind::NotFound);
}

#[test]
fn inherits_files_under_their_numbers_and_no_others() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let other = File::open("/dev/null").unwrap();
    let number = writer.as_raw_fd();
    let script = format!(
        "echo hello >&{number}; test -e /proc/self/fd/{} && echo leak >&{number}",
        other.as_raw_fd()
    );
    let mut spawn = Spawn::new("bash", vec!["-c".into(), script.into()]);
    spawn.inherit.push(writer.into());
    let process = Process::spawn(spawn).unwrap();
    ended(&process);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello\n");
}

#[test]
fn standard_streams_lead_where_asked() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut spawn = sh("echo out; echo err >&2");
    spawn.stderr = Stdio::Fd(writer.into());
    ended(&Process::spawn(spawn).unwrap());
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "err\n");
}

#[test]
fn a_process_has_a_session_of_its_own() {
    let process = Process::spawn(sh("exec sleep 100")).unwrap();
    let pid = Pid::from_raw(process.identity().pid.try_into().unwrap());
    assert_eq!(rustix::process::getsid(pid).unwrap(), pid.unwrap());
    process.kill().unwrap();
    ended(&process);
}

#[test]
fn adopts_by_pid_and_start_time_only() {
    let process = Process::spawn(sh("exec sleep 100")).unwrap();
    let identity = process.identity();
    let adopted = Process::adopt(identity).unwrap().expect("it runs");
    let reused = Identity {
        start_ticks: identity.start_ticks + 1,
        ..identity
    };
    assert!(Process::adopt(reused).unwrap().is_none());
    adopted.kill().unwrap();
    assert_eq!(ended(&process), Exit::Signal(9));
    assert!(Process::adopt(identity).unwrap().is_none());
}

#[test]
fn pids_that_cannot_be_are_nobody() {
    for pid in [0, u32::MAX, i32::MAX as u32] {
        let identity = Identity {
            pid,
            start_ticks: 0,
        };
        assert!(Process::adopt(identity).unwrap().is_none(), "{pid}");
        assert!(identity_of(pid).unwrap().is_none(), "{pid}");
    }
}

#[test]
fn an_unreaped_process_is_not_adopted() {
    let process = Process::spawn(sh("exit 0")).unwrap();
    let began = Instant::now();
    loop {
        let status = stat::status_of(process.identity().pid).unwrap().unwrap();
        if status.ended {
            break;
        }
        assert!(began.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    assert!(Process::adopt(process.identity()).unwrap().is_none());
    assert_eq!(ended(&process), Exit::Code(0));
}

#[test]
fn a_file_that_is_no_cgroup_or_namespace_is_refused() {
    let not_one = || Some(File::open("/dev/null").unwrap().into());
    let mut spawn = sh("true");
    spawn.cgroup = not_one();
    assert!(Process::spawn(spawn).is_err());
    let mut spawn = sh("true");
    spawn.netns = not_one();
    assert!(Process::spawn(spawn).is_err());
}

/// Started by the next test, in a process of its own: starts a child that is to die with it.
#[test]
fn helper_that_dies() {
    let Ok(path) = std::env::var("FORKD_TEST_DIE_WITH_PARENT") else {
        return;
    };
    let mut spawn = sh("exec sleep 100");
    spawn.die_with_parent = true;
    // From a thread that ends at once, which must not end the child.
    let process = std::thread::spawn(|| Process::spawn(spawn).unwrap()).join();
    let process = process.unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(process.try_wait().unwrap(), None);
    let identity = process.identity();
    let mut file = File::create(path).unwrap();
    write!(file, "{} {}", identity.pid, identity.start_ticks).unwrap();
}

#[test]
fn dies_with_the_process_but_not_with_the_thread() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("identity");
    let mut helper = std::process::Command::new(std::env::current_exe().unwrap());
    helper.args(["--exact", "process::tests::helper_that_dies"]);
    helper.env("FORKD_TEST_DIE_WITH_PARENT", &path);
    assert!(helper.output().unwrap().status.success());
    let text = std::fs::read_to_string(path).unwrap();
    let (pid, start_ticks) = text.split_once(' ').unwrap();
    let identity = Identity {
        pid: pid.parse().unwrap(),
        start_ticks: start_ticks.parse().unwrap(),
    };
    let began = Instant::now();
    while Process::adopt(identity).unwrap().is_some() {
        assert!(began.elapsed() < PATIENCE, "the child outlived its parent");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn memory_and_command_line_of_a_running_process() {
    let process = Process::spawn(sh("exec sleep 100")).unwrap();
    let began = Instant::now();
    // Until exec, the child is a copy of the parent.
    while command_line(process.identity().pid).unwrap().unwrap()[0] != "sleep" {
        assert!(began.elapsed() < PATIENCE);
    }
    let memory = process.memory().unwrap();
    assert!(memory.rss_kib > 0 && memory.private_kib <= memory.rss_kib);
    process.set_oom_score_adj(500).unwrap();
    process.kill().unwrap();
    ended(&process);
    assert!(process.memory().is_err());
    assert!(command_line(process.identity().pid).unwrap().is_none());
}

#[test]
fn reads_stat_lines_with_odd_names() {
    let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
    for name in ["sh", "a b", "a) S 1 (b", "(((", "\n"] {
        let expected = Status {
            start_ticks: 4711,
            ended: false,
        };
        assert_eq!(parse_status(&format!("12 ({name}) {tail}")), Some(expected));
    }
    for bad in ["", "12 sh S", "12 (sh) S 1", "12 (sh)"] {
        assert_eq!(parse_status(bad), None, "{bad:?}");
    }
}

#[test]
fn reads_memory_and_refuses_halves_of_it() {
    let text = "00-ff ---p 0 00:00 0 [rollup]\nRss:    10 kB\nPss:   7 kB\nPss_Dirty: 1 kB\n\
                Private_Clean:   2 kB\nPrivate_Dirty:  3 kB\n";
    let expected = Memory {
        rss_kib: 10,
        pss_kib: 7,
        private_kib: 5,
    };
    assert_eq!(parse_memory(text), Some(expected));
    assert_eq!(parse_memory("Rss: 10 kB\n"), None);
    assert_eq!(parse_memory("Rss: x kB\n"), None);
}
