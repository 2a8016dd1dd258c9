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

#[test]
fn processes_make_way_for_controllers() {
    let Some(root) = root("vacate") else { return };
    let subtree = root.leaf("container", &Limits::default()).unwrap();
    let mut sleepers: Vec<_> = (0..3)
        .map(|_| {
            let sleeper = Command::new("sleep").arg("60").spawn().unwrap();
            subtree.add(sleeper.id()).unwrap();
            sleeper
        })
        .collect();
    assert!(!is_own(subtree.path()));
    vacate(subtree.path()).unwrap();
    let procs = |path: &Path| fs::read_to_string(path.join("cgroup.procs")).unwrap();
    let moved = subtree.path().join(VACATED);
    assert_eq!(procs(subtree.path()), "");
    assert_eq!(procs(&moved).lines().count(), 3);
    // With nobody in it, nothing is left to do.
    vacate(subtree.path()).unwrap();
    Leaf::at(moved).unwrap().remove().unwrap();
    for sleeper in &mut sleepers {
        assert!(!sleeper.wait().unwrap().success());
    }
    subtree.remove().unwrap();
    fs::remove_dir(root.path()).unwrap();
}

/// Handing on processor time alone would make its leaves useless.
#[test]
fn a_group_that_others_use_hands_nothing_on() {
    let Some(root) = root("others") else { return };
    let group = root.leaf("used", &Limits::default()).unwrap();
    let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
    group.add(sleeper.id()).unwrap();
    let inside = Root::open(&group.path().join("forkd")).unwrap();
    assert_eq!(inside.controllers(), [""; 0]);
    let kind = fs::read_to_string(group.path().join("cgroup.type")).unwrap();
    assert_eq!(kind.trim(), "domain");
    // A leaf of it can be entered, though not limited.
    let leaf = inside.leaf("sandbox", &Limits::default()).unwrap();
    leaf.add(sleeper.id()).unwrap();
    leaf.remove().unwrap();
    assert!(!sleeper.wait().unwrap().success());
    inside.remove_if_empty();
    group.remove().unwrap();
    fs::remove_dir(root.path()).unwrap();
}

#[test]
fn knows_the_group_it_is_in() {
    let Some(own) = own_group() else { return };
    assert!(is_own(&own));
    let Some(root) = root("own") else { return };
    assert!(!is_own(root.path()));
    fs::remove_dir(root.path()).unwrap();
}

/// A program that was started in a delegated subtree, such as a container's, uses it: this test's own program, run again there.
#[test]
fn a_delegated_subtree_is_used_from_inside() {
    const INSIDE: &str = "FORKD_TEST_SUBTREE";
    if let Some(subtree) = std::env::var_os(INSIDE) {
        let subtree = PathBuf::from(subtree);
        assert!(is_own(&subtree));
        let offered = fs::read_to_string(subtree.join("cgroup.controllers")).unwrap();
        let root = Root::open(&subtree.join("forkd")).unwrap();
        for controller in offered
            .split_whitespace()
            .filter(|c| CONTROLLERS.contains(c))
        {
            assert!(
                root.controllers().iter().any(|c| c == controller),
                "{controller}"
            );
        }
        let leaf = root.leaf("sandbox", &Limits::default()).unwrap();
        leaf.remove().unwrap();
        root.remove_if_empty();
        return;
    }
    let Some(root) = root("delegated") else {
        return;
    };
    let subtree = root.leaf("container", &Limits::default()).unwrap();
    let name = "cgroup::tests::a_delegated_subtree_is_used_from_inside";
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec {} --exact {name} --nocapture 2>&1",
        subtree.path().display(),
        std::env::current_exe().unwrap().display()
    );
    let mut inside = Command::new("sh");
    inside.args(["-c", &script]).env(INSIDE, subtree.path());
    let output = inside.output().unwrap();
    let moved = Leaf::at(subtree.path().join(VACATED));
    // Without a controller to hand on, nobody is in the way.
    assert_eq!(moved.is_some(), !root.controllers().is_empty());
    if let Some(moved) = moved {
        moved.remove().unwrap();
    }
    let _ = fs::remove_dir(subtree.path().join("forkd"));
    subtree.remove().unwrap();
    fs::remove_dir(root.path()).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
}
