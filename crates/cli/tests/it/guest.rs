//! Reaching into sandboxes that a daemon runs.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use super::world::{Daemon, World, finish, lines, wait};

/// A megabyte, in bytes.
const MIB: u64 = 1 << 20;

#[test]
fn a_sandbox_is_used_in_every_way() {
    let Some(world) = World::seeded() else { return };
    let daemon = world.serve();
    let args = [
        "fork",
        "--tag",
        "seed",
        "-n",
        "2",
        "--env",
        "GREETING=hello",
        "--metadata",
        "k=v",
    ];
    let out = daemon.run(&world, args).ok();
    let ids: Vec<&str> = out.lines().collect();
    let id = ids[0];

    let list: Value = serde_json::from_str(&daemon.run(&world, ["ls", "--json"]).ok()).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert_eq!(list[0]["metadata"]["k"], "v");

    exit_codes(&world, &daemon, id);
    streams_as_they_come(&world, &daemon, id);
    much_output_in_little_memory(&world, &daemon, id);
    evaluates(&world, &daemon, &ids);
    copies_files(&world, &daemon, id);
    copies_directories(&world, &daemon, id);

    assert!(
        daemon
            .run(&world, ["ping", id])
            .ok()
            .contains("eval python")
    );
    daemon.run(&world, ["logs", id]).ok();
    daemon.run(&world, ["pause", id]).ok();
    daemon
        .run(&world, ["exec", id, "--", "true"])
        .fails(125, &["paused", "resume"]);
    daemon.run(&world, ["resume", id]).ok();
    daemon.run(&world, ["exec", id, "--", "true"]).ok();

    branches(&world, &daemon, id);
    daemon.run(&world, ["kill", id]).ok();
    daemon
        .run(&world, ["exec", id, "--", "true"])
        .fails(125, &[id]);
    daemon
        .run(&world, ["rmi", "seed"])
        .fails(1, &[ids[1], "kill"]);
    daemon.run(&world, ["kill", "--all"]).ok();
    daemon.run(&world, ["rmi", "seed"]).ok();
    daemon.stop();
    world.assert_clean(&[]);
}

fn exit_codes(world: &World, daemon: &Daemon, id: &str) {
    let said = daemon.run(
        world,
        [
            "exec",
            id,
            "--",
            "sh",
            "-c",
            "echo out; echo err >&2; exit 42",
        ],
    );
    assert_eq!(
        (said.code, &*said.out, &*said.err),
        (Some(42), "out\n", "err\n")
    );
    let env = [
        "exec",
        id,
        "--env",
        "A=b",
        "--cwd",
        "/usr",
        "--",
        "sh",
        "-c",
        "echo $GREETING $A $PWD",
    ];
    assert_eq!(daemon.run(world, env).ok(), "hello b /usr\n");
    daemon
        .run(world, ["exec", id, "--", "no-such-program"])
        .fails(127, &["not found"]);
    daemon
        .run(world, ["exec", id, "--", "/etc/passwd"])
        .fails(126, &["ermission"]);
    daemon
        .run(world, ["exec", id, "--timeout", "1s", "--", "sleep", "60"])
        .fails(124, &["time"]);
    let killed = daemon.run(world, ["exec", id, "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.code, Some(137), "{killed:?}");
    daemon
        .run(world, ["exec", "sb-nobody", "--", "true"])
        .fails(125, &["sb-nobody"]);
}

fn streams_as_they_come(world: &World, daemon: &Daemon, id: &str) {
    let script = "read a; echo got $a; sleep 1; read b; echo got $b";
    let mut command = world.forkd(["exec", id, "--", "sh", "-c", script]);
    let mut child = daemon
        .at(&mut command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = lines(child.stdout.take().unwrap());
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"one\n").unwrap();
    // The answer comes while the command runs and its input is open.
    let (_, line) = out.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(line, "got one");
    assert!(child.try_wait().unwrap().is_none());
    input.write_all(b"two\n").unwrap();
    assert_eq!(
        out.recv_timeout(Duration::from_secs(30)).unwrap().1,
        "got two"
    );
    drop(input);
    assert!(child.wait().unwrap().success());
}

fn much_output_in_little_memory(world: &World, daemon: &Daemon, id: &str) {
    const TOTAL: u64 = 100_000_000;
    let script = format!("head -c {TOTAL} /dev/zero");
    let mut command = world.forkd(["exec", id, "--", "sh", "-c", &script]);
    let mut child = daemon
        .at(&mut command)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut buffer = vec![0; 1 << 16];
    let (mut total, mut peak) = (0, 0);
    loop {
        let len = out.read(&mut buffer).unwrap();
        if len == 0 {
            break;
        }
        total += len as u64;
        if total % (8 * MIB) < len as u64 {
            for pid in [child.id(), daemon.pid()] {
                peak = peak.max(resident_kib(pid).unwrap_or(0));
            }
        }
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(total, TOTAL);
    assert!((1..128 * 1024).contains(&peak), "{peak} KiB resident");
}

fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn evaluates(world: &World, daemon: &Daemon, ids: &[&str]) {
    let eval = |id: &str, code: &str| daemon.run(world, ["eval", id, "--", code]);
    assert_eq!(eval(ids[0], "inherited + 1").ok(), "42\n");
    assert_eq!(eval(ids[0], "mine = 7; print('said')").ok(), "said\n");
    assert_eq!(eval(ids[0], "mine * 6").ok(), "42\n");
    eval(ids[1], "mine").fails_with("NameError");
    let random = |id| eval(id, "numpy.random.random()").ok();
    assert_ne!(random(ids[0]), random(ids[1]), "forks drew the same number");
}

trait FailsWith {
    fn fails_with(self, text: &str);
}

impl FailsWith for super::world::Said {
    #[track_caller]
    fn fails_with(self, text: &str) {
        assert_eq!(self.code, Some(1), "{self:#?}");
        assert!(self.err.contains(text), "{self:#?}");
    }
}

fn copies_files(world: &World, daemon: &Daemon, id: &str) {
    let (here, back) = (world.dir().join("here"), world.dir().join("back"));
    let content: Vec<u8> = (0..3 * MIB).map(|i| (i * 31 % 251) as u8).collect();
    fs::write(&here, &content).unwrap();
    let inside = format!("{id}:/srv/deep/file");
    daemon
        .run(world, ["cp", here.to_str().unwrap(), &inside])
        .ok();
    daemon
        .run(world, ["cp", &inside, back.to_str().unwrap()])
        .ok();
    assert!(
        fs::read(&back).unwrap() == content,
        "the file changed on its way"
    );

    let mut command = world.forkd(["cp", "-", &format!("{id}:/srv/text")]);
    let mut child = daemon
        .at(&mut command)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"piped").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(
        daemon
            .run(world, ["cp", &format!("{id}:/srv/text"), "-"])
            .ok(),
        "piped"
    );

    let absent = world.dir().join("absent");
    let nowhere = format!("{id}:/no/such/file");
    daemon
        .run(world, ["cp", &nowhere, absent.to_str().unwrap()])
        .fails(1, &["/no/such/file"]);
    assert!(!absent.exists(), "a failed copy left a file");
    daemon.run(world, ["cp", "a", "b"]).fails(2, &["ID:PATH"]);
}

fn copies_directories(world: &World, daemon: &Daemon, id: &str) {
    let tree = world.dir().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/x"), "x").unwrap();
    std::os::unix::fs::symlink("sub/x", tree.join("link")).unwrap();
    let inside = format!("{id}:/srv/tree");
    daemon
        .run(world, ["cp", tree.to_str().unwrap(), &inside])
        .ok();
    let back = world.dir().join("tree-back");
    daemon
        .run(world, ["cp", &inside, back.to_str().unwrap()])
        .ok();
    assert_eq!(fs::read_to_string(back.join("sub/x")).unwrap(), "x");
    assert_eq!(
        fs::read_link(back.join("link")).unwrap().to_str(),
        Some("sub/x")
    );
}

fn branches(world: &World, daemon: &Daemon, id: &str) {
    daemon.run(world, ["eval", id, "--", "mine = 99"]).ok();
    assert_eq!(
        daemon.run(world, ["branch", id, "--tag", "mid"]).ok(),
        "mid\n"
    );
    let child = daemon.fork(world, "mid", 1);
    assert_eq!(
        daemon.run(world, ["eval", &child[0], "--", "mine"]).ok(),
        "99\n"
    );
    daemon.run(world, ["rmi", "--cascade", "mid"]).ok();
    let list = daemon.run(world, ["ls", "--quiet"]).ok();
    assert!(!list.contains(&child[0]), "{list}");
}

#[test]
fn a_killed_vm_is_noticed_and_leaves_nothing() {
    let Some(world) = World::seeded() else { return };
    let daemon = world.serve();
    let ids = daemon.fork(&world, "seed", 2);
    let list: Value = serde_json::from_str(&daemon.run(&world, ["ls", "--json"]).ok()).unwrap();
    let victim = list
        .as_array()
        .unwrap()
        .iter()
        .find(|s| s["id"] == *ids[0])
        .unwrap();
    let mut command = world.forkd(["exec", &ids[0], "--", "sleep", "60"]);
    daemon
        .at(&mut command)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let running = std::thread::spawn(move || finish(command));
    std::thread::sleep(Duration::from_millis(500));
    super::world::signal(victim["pid"].as_u64().unwrap() as u32, "KILL");
    running.join().unwrap().fails(125, &[]);
    wait("the dead sandbox to go", || {
        let list = daemon.run(&world, ["ls", "--quiet"]).ok();
        (!list.contains(&ids[0])).then_some(())
    });
    daemon.run(&world, ["exec", &ids[1], "--", "true"]).ok();
    daemon.run(&world, ["kill", "--all"]).ok();
    daemon.stop();
    world.assert_clean(&["seed"]);
}
