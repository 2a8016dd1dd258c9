//! What this host lacks of isolation, as `forkd doctor` and `forkd serve --require-isolation` tell it. Needs no guests.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use forkd_host::cgroup;
use forkd_host::facts::{Facts, find_tool};
use serde_json::Value;

use super::world::Said;

/// A node of this test's own, without images.
struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Node {
        Node(tempfile::Builder::new().prefix("fk").tempdir().unwrap())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn forkd(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkd"));
        command
            .args(args)
            .env("FORKD_URL", "none")
            .env("FORKD_DATA_DIR", self.path("data"))
            .env("FORKD_RUN_DIR", self.path("run"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    /// The control group of its sandboxes, if one is there.
    fn group(&self) -> Option<std::path::PathBuf> {
        use std::os::unix::fs::MetadataExt;
        let home = std::fs::metadata(self.path("data")).ok()?;
        let node = format!("forkd/node-{:x}-{:x}", home.dev(), home.ino());
        Some(cgroup::mount_point()?.join(node)).filter(|path| path.exists())
    }
}

/// Controllers that limits need and this host has not.
fn lacking(facts: &Facts) -> Vec<&'static str> {
    let has = |wanted: &&str| facts.cgroup.controllers.iter().any(|has| has == wanted);
    cgroup::CONTROLLERS
        .into_iter()
        .filter(|wanted| !has(wanted))
        .collect()
}

#[test]
fn the_doctor_names_each_miss_with_its_remedy() {
    let node = Node::new();
    let said = Said::from(node.forkd(&["doctor", "--json"]).output().unwrap());
    let report: Value = serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{said:#?}"));
    let checks = report["checks"].as_array().unwrap();
    for check in checks.iter().filter(|check| check["status"] != "ok") {
        let remedy = check["remedy"].as_str().unwrap_or_default();
        assert!(!remedy.is_empty(), "no remedy: {check}");
    }
    let failures = checks.iter().filter(|check| check["status"] == "fail");
    let code = i32::from(failures.count() > 0);
    assert_eq!(said.code, Some(code), "{said:#?}");

    let limits = checks.iter().find(|c| c["name"] == "cgroup v2").unwrap();
    let facts = Facts::collect();
    let lacking = lacking(&facts);
    let expected = if lacking.is_empty() { "ok" } else { "warn" };
    assert_eq!(limits["status"], expected, "{limits}");
    if facts.cgroup.v2.is_some() {
        for controller in lacking {
            let detail = limits["detail"].as_str().unwrap();
            assert!(detail.contains(controller), "{controller}: {limits}");
        }
    }
}

#[test]
fn a_daemon_that_must_isolate_names_every_miss_and_leaves_nothing() {
    if find_tool("qemu-system-x86_64", "--version").is_none() {
        println!("skipped: there is no QEMU, so no engine to confine");
        return;
    }
    let node = Node::new();
    let args = [
        "serve",
        "--engine",
        "qemu",
        "--bind",
        "127.0.0.1:0",
        "--audit-log",
        "none",
        "--require-isolation",
    ];
    let log = node.path("log");
    let mut command = node.forkd(&args);
    command.stderr(std::fs::File::create(&log).unwrap());
    let mut daemon = command.spawn().unwrap();
    let facts = Facts::collect();
    let lacking = lacking(&facts);
    let ended = ended_or_serving(&mut daemon, &log);
    let text = std::fs::read_to_string(&log).unwrap();
    if facts.uid == 0 && lacking.is_empty() && ended.is_none() {
        // A complete host. It serves.
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        return;
    }
    assert_eq!(ended, Some(1), "{text}");
    let refusal = text.lines().find(|line| line.contains("but lacks: "));
    let refusal = refusal.unwrap_or_else(|| panic!("{text}"));
    assert!(refusal.contains("--require-isolation"), "{refusal}");
    if facts.cgroup.v2.is_some() && facts.uid == 0 {
        for controller in lacking {
            let miss = format!("{controller}: ");
            assert!(refusal.contains(&miss), "no {miss:?} in {refusal}");
        }
    }
    assert_eq!(node.group(), None, "a control group is left");
}

/// The exit code, or `None` once it serves.
fn ended_or_serving(daemon: &mut Child, log: &Path) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(120);
    while Instant::now() < deadline {
        if let Some(status) = daemon.try_wait().unwrap() {
            return status.code();
        }
        if std::fs::read_to_string(log).unwrap().contains("serving") {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = daemon.kill();
    panic!("neither: {}", std::fs::read_to_string(log).unwrap());
}
