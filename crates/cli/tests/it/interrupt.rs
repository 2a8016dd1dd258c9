//! Ctrl-C at any moment, and a daemon that dies in the middle of its work.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::world::{IMAGE, Said, World, signal, wait};

/// Runs a command, interrupts it after a while, and gives what it said.
fn interrupted(mut command: Command, after: Duration) -> Said {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    std::thread::sleep(after);
    signal(pid, "INT");
    Said::from(child.wait_with_output().unwrap())
}

#[test]
fn an_interrupted_snapshot_leaves_nothing() {
    let Some(world) = World::new() else { return };
    let args = [
        "snapshot",
        "--tag",
        "cut",
        "--image",
        IMAGE,
        "--warm",
        "import time; time.sleep(60)",
    ];
    // While the process starts, while the guest boots, early and late, and while it warms up.
    for after in [100, 1000, 4000, 15_000] {
        let said = interrupted(world.forkd(args), Duration::from_millis(after));
        // Before it listens to signals, the signal itself ends it.
        let by_signal = said.code.is_none() && after <= 100;
        assert!(
            by_signal || said.code == Some(130),
            "after {after} ms: {said:#?}"
        );
        world.assert_clean(&[]);
    }
}

#[test]
fn an_interrupted_image_build_leaves_nothing() {
    let Some(world) = World::new() else { return };
    let store = tempfile::tempdir().unwrap();
    // While packages are looked up, and while a root is put together. A package of its own, so that nothing is cached.
    for after in [300, 3000, 8000] {
        let mut command = world.forkd(["image", "build", "--debian", "cowsay"]);
        command.env("FORKD_IMAGE_ROOT", store.path());
        let said = interrupted(command, Duration::from_millis(after));
        assert_eq!(said.code, Some(130), "after {after} ms: {said:#?}");
        let mut list = world.forkd(["image", "ls", "--json"]);
        list.env("FORKD_IMAGE_ROOT", store.path());
        assert_eq!(Said::from(list.output().unwrap()).ok().trim(), "[]");
        let users = processes_naming(store.path());
        assert!(users.is_empty(), "after {after} ms: {users:?}");
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(store.path().to_str().unwrap()), "{mounts}");
    }
    // Steps that were finished are kept for the next build; what was being made is not.
    let unfinished = std::fs::read_dir(store.path().join("tmp")).unwrap();
    let unfinished: Vec<_> = unfinished.map(|entry| entry.unwrap().path()).collect();
    assert!(unfinished.is_empty(), "left behind: {unfinished:?}");
    world.assert_clean(&[]);
}

/// The command lines of whatever process names this path.
fn processes_naming(path: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines
        .filter(|line| line.contains(path.to_str().unwrap()))
        .collect()
}

#[test]
fn an_interrupted_fan_out_leaves_nothing() {
    let Some(world) = World::seeded() else { return };
    for after in [400, 1200, 2500] {
        let command = world.forkd(["bench", "--tag", "seed", "--n", "12"]);
        let said = interrupted(command, Duration::from_millis(after));
        assert_eq!(said.code, Some(130), "after {after} ms: {said:#?}");
        assert!(said.err.contains("interrupted"), "{said:#?}");
        world.assert_clean(&["seed"]);
    }
}

#[test]
fn an_interrupted_fork_and_exec_of_a_daemon_leave_nothing() {
    let Some(world) = World::seeded() else { return };
    let daemon = world.serve();
    // More forks than any machine makes within the later moment.
    for after in [150, 600] {
        let mut command = world.forkd(["fork", "--tag", "seed", "-n", "24"]);
        daemon.at(&mut command);
        let said = interrupted(command, Duration::from_millis(after));
        assert_eq!(said.code, Some(130), "{said:#?}");
        assert_eq!(
            daemon.run(&world, ["ls", "--quiet"]).ok(),
            "",
            "sandboxes left"
        );
    }
    let id = &daemon.fork(&world, "seed", 1)[0];
    let mut command = world.forkd(["exec", id, "--", "sh", "-c", "sleep 4242"]);
    daemon.at(&mut command);
    let said = interrupted(command, Duration::from_millis(1500));
    assert_eq!(said.code, Some(130), "{said:#?}");
    let find = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 424[2]'";
    wait("the command in the guest to end", || {
        let count = daemon.run(&world, ["exec", id, "--", "sh", "-c", find]);
        (count.out.trim() == "0").then_some(())
    });
    daemon.run(&world, ["kill", "--all"]).ok();
    daemon.stop();
    world.assert_clean(&["seed"]);
}

#[test]
fn a_daemon_killed_in_mid_fork_leaves_no_orphan() {
    let Some(world) = World::seeded() else { return };
    for after in [60, 250, 700] {
        let daemon = world.serve();
        let mut command = world.forkd(["fork", "--tag", "seed", "-n", "4"]);
        let child = daemon
            .at(&mut command)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(after));
        daemon.kill_hard();
        let said = Said::from(child.wait_with_output().unwrap());
        // The last of them may have been done already.
        if said.code != Some(0) {
            said.fails(1, &["connection"]);
        }

        let next = world.serve();
        let list = next.run(&world, ["ls", "--quiet"]).ok();
        for id in list.lines() {
            next.run(&world, ["exec", id, "--", "true"]).ok();
        }
        next.run(&world, ["kill", "--all"]).ok();
        next.stop();
        world.assert_clean(&["seed"]);
    }
}
