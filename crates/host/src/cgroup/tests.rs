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
        io: IoRates {
            read_bytes: Some(1_000_000),
            writes: Some(50),
            ..IoRates::default()
        },
        disks: [254, 8].map(|major| Device { major, minor: 0 }).to_vec(),
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
            "io.max 254:0 rbps=1000000 wiops=50",
            "io.max 8:0 rbps=1000000 wiops=50",
        ]
    );
    // Disks alone limit nothing.
    let unlimited = settings(&Limits {
        disks: limits.disks,
        ..Limits::default()
    });
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

/// Writes past the page cache what a leaf may write in two seconds, and looks at the clock.
#[test]
fn a_disk_writer_is_slowed_to_its_limit() {
    let dir = std::env::current_dir().unwrap();
    let Some(root) = root("io") else { return };
    let disk = crate::block::backing(&dir);
    let crate::block::Backing::Disk(disk) = disk else {
        eprintln!("skipped: {} is on {disk:?}", dir.display());
        fs::remove_dir(root.path()).unwrap();
        return;
    };
    if !root.controllers().iter().any(|c| c == "io") {
        eprintln!("skipped: this host has no io controller in version 2");
        fs::remove_dir(root.path()).unwrap();
        return;
    }
    let limits = Limits {
        io: IoRates {
            write_bytes: Some(4 << 20),
            ..IoRates::default()
        },
        disks: vec![disk],
        ..Limits::default()
    };
    let leaf = root.leaf("writer", &limits).unwrap();
    let file = dir.join(format!(".forkd-io-test-{}", std::process::id()));
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec dd if=/dev/zero of={} bs=1M count=8 oflag=direct 2>&1",
        leaf.path().display(),
        file.display()
    );
    let started = Instant::now();
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let took = started.elapsed();
    fs::remove_file(&file).unwrap();
    leaf.remove().unwrap();
    fs::remove_dir(root.path()).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(took > Duration::from_millis(1500), "{took:?}: {said}");
}
