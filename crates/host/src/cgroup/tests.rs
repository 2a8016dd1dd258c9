//! Tests of control groups, with real ones where there are any.

use std::process::{Command, Stdio};

use super::*;

#[test]
fn finds_the_mount_whatever_stands_before_it() {
    let hybrid = "25 30 0:23 / /sys rw - sysfs sysfs rw\n\
                  31 25 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(mounted(hybrid), Some("/sys/fs/cgroup/unified".into()));
    assert_eq!(mounted("25 30 0:23 / /sys rw - sysfs sysfs rw\n"), None);
}

#[test]
fn limits_are_written_as_the_kernel_reads_them() {
    let limits = Limits {
        memory_bytes: Some(1 << 29),
        cpu_milli: Some(1500),
        pids: Some(64),
        io: Some(IoLimit {
            device: (254, 0),
            read_bps: 1_000_000,
            write_bps: 2_000_000,
        }),
    };
    let written: Vec<_> = settings(&limits)
        .into_iter()
        .map(|(_, f, v)| format!("{f} {v}"))
        .collect();
    assert_eq!(
        written,
        [
            "memory.max 536870912",
            "cpu.max 150000 100000",
            "pids.max 64",
            "memory.swap.max 0",
            "io.max 254:0 rbps=1000000 wbps=2000000",
        ]
    );
    let unlimited = settings(&Limits::default());
    assert!(
        unlimited.iter().all(|(_, _, v)| v.starts_with("max")),
        "{unlimited:?}"
    );
}

/// A group of this test's own, where there is version 2 and it may be written.
fn root(name: &str) -> Option<Root> {
    let mount = mount_point()?;
    match Root::open(&mount.join(format!("forkd-test-{name}-{}", std::process::id()))) {
        Ok(root) => Some(root),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

#[test]
fn what_runs_in_a_leaf_ends_with_it() {
    let Some(root) = root("remove") else { return };
    let leaf = root.leaf("child-1", &Limits::default()).unwrap();
    let mut process = Command::new("sleep")
        .arg("60")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    leaf.add(process.id()).unwrap();
    let inside = fs::read_to_string(leaf.path().join("cgroup.procs")).unwrap();
    assert_eq!(inside.trim(), process.id().to_string());
    assert_eq!(root.leaves("child-").unwrap(), std::slice::from_ref(&leaf));
    // It cannot be reaped by anybody but us, and a group is empty without its zombies.
    leaf.remove().unwrap();
    assert!(!process.wait().unwrap().success());
    assert!(root.leaves("child-").unwrap().is_empty());
    leaf.remove().unwrap();
    fs::remove_dir(root.path()).unwrap();
}

#[test]
fn a_limit_that_nobody_would_enforce_is_refused() {
    let Some(root) = root("refuse") else { return };
    let limits = Limits {
        memory_bytes: Some(1 << 30),
        ..Limits::default()
    };
    let leaf = root.leaf("child-1", &limits);
    if root.controllers().iter().any(|c| c == "memory") {
        let path = leaf.unwrap();
        assert_eq!(
            fs::read_to_string(path.path().join("memory.max"))
                .unwrap()
                .trim(),
            "1073741824"
        );
        path.remove().unwrap();
    } else {
        let said = leaf.unwrap_err().to_string();
        assert!(said.contains("cannot limit memory"), "{said}");
        assert!(root.leaves("").unwrap().is_empty(), "a leaf is left");
    }
    fs::remove_dir(root.path()).unwrap();
}
