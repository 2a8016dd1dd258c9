//! What goes wrong on a host: a clear refusal, and the service goes on.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Answer;
use crate::daemon::{Daemon, PATIENCE};

/// The program over the fake engine.
fn fake() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-controller"));
    command.args(["serve", "--engine", "fake"]);
    command
}

/// The same in a mount namespace of its own, with a file system of this size, in MiB, at DIR/data.
fn on_small_disk(dir: &Path, options: &str) -> Command {
    let data = dir.join("data");
    std::fs::create_dir_all(&data).unwrap();
    let script = format!(
        "mount -t tmpfs -o {options} tmpfs {} && exec \"$0\" serve --engine fake",
        data.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    command.arg(env!("CARGO_BIN_EXE_forkd-controller"));
    command
}

fn code(answer: &Answer) -> String {
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert!(!body["error"].as_str().unwrap().is_empty(), "{body}");
    body["code"].as_str().unwrap().to_owned()
}

fn ask(daemon: &Daemon, method: &str, path: &str, body: &Value) -> Answer {
    let answer = daemon.ask(method, path, body);
    answer.unwrap_or_else(|| panic!("{method} {path}: no answer: {}", daemon.log()))
}

fn snapshot(daemon: &Daemon, dir: &Path, tag: &str) -> Answer {
    let file = |name: &str| {
        let path = dir.join(name);
        std::fs::write(&path, name).unwrap();
        path
    };
    let body = json!({"tag": tag, "kernel": file("kernel"), "initramfs": file("initramfs"),
        "rootfs": file("rootfs"), "memory_mib": 64});
    ask(daemon, "POST", "/v1/snapshots", &body)
}

fn fork(daemon: &Daemon) -> Answer {
    ask(
        daemon,
        "POST",
        "/v1/sandboxes",
        &json!({"snapshot_tag": "base"}),
    )
}

fn id_of(answer: &Answer) -> String {
    let made: Value = serde_json::from_slice(&answer.body).unwrap();
    made[0]["id"].as_str().unwrap().to_owned()
}

/// Tests that change mounts need root.
fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        println!("skipped: mounting a small file system needs root");
    }
    may
}

#[test]
fn a_full_disk_refuses_what_needs_room_and_nothing_else() {
    if !may_mount() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let make = || on_small_disk(dir.path(), "size=512m");
    let daemon = Daemon::start(dir.path(), &make);
    assert_eq!(snapshot(&daemon, dir.path(), "base").status, 201);
    let made = fork(&daemon);
    assert_eq!(made.status, 201);
    let sandbox = id_of(&made);

    // The daemon sees another file system there than this test does.
    let data = format!(
        "/proc/{}/root{}",
        daemon.pid(),
        dir.path().join("data").display()
    );
    let filler = Path::new(&data).join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while file.write(&[1; 1 << 20]).is_ok_and(|n| n > 0) {}

    let refused = snapshot(&daemon, dir.path(), "second");
    assert_eq!(
        (refused.status, code(&refused).as_str()),
        (507, "insufficient_resources")
    );
    let refused = fork(&daemon);
    let text = String::from_utf8_lossy(&refused.body).into_owned();
    assert_eq!(refused.status, 507, "{text}");
    assert_eq!(code(&refused), "insufficient_resources", "{text}");
    let refused = ask(
        &daemon,
        "POST",
        &format!("/v1/sandboxes/{sandbox}/branch"),
        &json!({"tag": "child"}),
    );
    assert_eq!(refused.status, 507);
    // What needs no room goes on.
    daemon.answers(&sandbox).unwrap();
    assert_eq!(daemon.get("/v1/snapshots").as_array().unwrap().len(), 1);
    assert_eq!(daemon.get("/v1/sandboxes").as_array().unwrap().len(), 1);
    assert_eq!(daemon.get("/readyz")["ready"], true);

    drop(file);
    std::fs::remove_file(&filler).unwrap();
    let made = fork(&daemon);
    let text = String::from_utf8_lossy(&made.body).into_owned();
    assert_eq!(made.status, 201, "{text}");
    assert_eq!(snapshot(&daemon, dir.path(), "second").status, 201);
}

#[test]
fn a_state_that_cannot_be_written_is_refused_at_the_start() {
    if !may_mount() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let make = || on_small_disk(dir.path(), "size=64m,ro");
    let said = Daemon::try_start(dir.path(), &make).err().unwrap();
    assert!(said.contains("Read-only file system"), "{said}");
    assert!(
        said.contains(&dir.path().join("data").display().to_string()),
        "{said}"
    );

    // A directory is in its place.
    let dir = TempDir::new().unwrap();
    std::fs::create_dir_all(dir.path().join("data/state.db")).unwrap();
    let said = Daemon::try_start(dir.path(), &fake).err().unwrap();
    assert!(said.contains("data/state.db"), "{said}");
}

#[test]
fn a_state_of_a_newer_version_or_a_damaged_one_is_refused_and_left_alone() {
    let dir = TempDir::new().unwrap();
    Daemon::start(dir.path(), &fake).kill();
    let state = dir.path().join("data/state.db");
    let mut bytes = std::fs::read(&state).unwrap();
    // Where SQLite keeps `user_version`.
    bytes[60..64].copy_from_slice(&99_u32.to_be_bytes());
    for log in ["state.db-wal", "state.db-shm"] {
        let _ = std::fs::remove_file(dir.path().join("data").join(log));
    }
    std::fs::write(&state, &bytes).unwrap();
    let said = Daemon::try_start(dir.path(), &fake).err().unwrap();
    assert!(
        said.contains("version 99") && said.contains("newer program"),
        "{said}"
    );
    assert_eq!(std::fs::read(&state).unwrap()[60..64], 99_u32.to_be_bytes());

    std::fs::write(&state, [0xa5; 8192]).unwrap();
    let said = Daemon::try_start(dir.path(), &fake).err().unwrap();
    assert!(
        said.contains("damaged") && said.contains("move the file away"),
        "{said}"
    );
    assert_eq!(std::fs::read(&state).unwrap(), [0xa5; 8192]);
}

#[test]
fn ten_thousand_idle_connections_do_no_harm() {
    const IDLE: u64 = 10_000;
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let idle = limit
        .maximum
        .map_or(IDLE, |most| IDLE.min(most.saturating_sub(200)));
    if idle < IDLE {
        println!("only {idle} connections: this system allows no more open files");
    }
    let dir = TempDir::new().unwrap();
    let daemon = Daemon::start(dir.path(), &fake);
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        kib
    };
    let before = resident();
    let mut open = vec![];
    for _ in 0..idle {
        open.push(TcpStream::connect(daemon.addr).unwrap());
    }
    let begun = Instant::now();
    loop {
        let text = String::from_utf8(ask(&daemon, "GET", "/metrics", &Value::Null).body).unwrap();
        let gauge = text
            .lines()
            .find_map(|line| line.strip_prefix("forkd_connections "));
        // It counts the connection it is asked on as well.
        if gauge.unwrap().parse::<u64>().unwrap() > idle {
            break;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "not all were accepted: {gauge:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(snapshot(&daemon, dir.path(), "base").status, 201);
    let made = fork(&daemon);
    assert_eq!(made.status, 201);
    daemon.answers(&id_of(&made)).unwrap();
    let each = (resident() - before) / idle;
    assert!(each < 32, "an idle connection takes {each} KiB");
    drop(open);
    daemon.answers(&id_of(&made)).unwrap();
}

/// Reads until the other side closes; how long that took.
fn until_closed(mut stream: TcpStream) -> (String, Duration) {
    let begun = Instant::now();
    stream
        .set_read_timeout(Some(Duration::from_secs(90)))
        .unwrap();
    let mut answer = vec![];
    let _ = stream.read_to_end(&mut answer);
    (
        String::from_utf8_lossy(&answer).into_owned(),
        begun.elapsed(),
    )
}

#[test]
fn slow_clients_are_let_go_and_hold_up_nobody() {
    let dir = TempDir::new().unwrap();
    let daemon = Daemon::start(dir.path(), &fake);
    let send = |text: &str| {
        let mut stream = TcpStream::connect(daemon.addr).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        std::thread::spawn(move || until_closed(stream))
    };
    let head = "POST /v1/sandboxes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n";
    let never_ends = send("GET /healthz HTTP/1.1\r\nhost: x\r\nx-slow: ");
    let no_body = send(&format!("{head}content-length: 100\r\n\r\n{{\"n\":"));
    let keyed = send(&format!(
        "{head}idempotency-key: k\r\ncontent-length: 100\r\n\r\n{{"
    ));
    assert_eq!(daemon.get("/healthz"), json!({"ok": true}));
    for slow in [no_body, keyed] {
        let (answer, took) = slow.join().unwrap();
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        assert!(answer.contains("did not arrive within"), "{answer}");
        assert!(took < Duration::from_secs(60), "{took:?}");
    }
    let (answer, took) = never_ends.join().unwrap();
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
        "{answer}"
    );
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(daemon.get("/healthz"), json!({"ok": true}));
}

#[test]
fn at_its_end_requests_are_finished_until_the_deadline_and_cut_off_then() {
    let dir = TempDir::new().unwrap();
    let make = || {
        let mut command = fake();
        command.args(["--drain-secs", "3"]);
        command
    };
    let mut daemon = Daemon::start(dir.path(), &make);
    assert_eq!(snapshot(&daemon, dir.path(), "base").status, 201);
    let sandbox = id_of(&fork(&daemon));
    let sleep = |seconds: &str| {
        let body = json!({"args": ["sleep", seconds], "timeout_secs": 0}).to_string();
        let path = format!("/v1/sandboxes/{sandbox}/exec");
        let mut client = crate::client::Client::connect(daemon.addr).unwrap();
        std::thread::spawn(move || client.ask("POST", &path, &body))
    };
    let (short, long) = (sleep("1"), sleep("600"));
    // Both must be under way before the signal; how many are, the daemon tells.
    let begun = Instant::now();
    let path = format!("/v1/sandboxes/{sandbox}/processes");
    while daemon.get(&path).as_array().unwrap().len() < 2 {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = Pid::from_raw(daemon.pid().cast_signed()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let signalled = Instant::now();
    assert_eq!(short.join().unwrap().unwrap().status, 200);
    while !daemon.has_ended() {
        assert!(signalled.elapsed() < PATIENCE, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(
        signalled.elapsed() >= Duration::from_secs(3),
        "{:?}",
        signalled.elapsed()
    );
    assert!(long.join().unwrap().is_err(), "cut off");
    assert!(
        daemon.log().contains("cut off at the deadline"),
        "{}",
        daemon.log()
    );
}

#[test]
fn tricks_in_names_reach_no_file() {
    let dir = TempDir::new().unwrap();
    let daemon = Daemon::start(dir.path(), &fake);
    assert_eq!(snapshot(&daemon, dir.path(), "base").status, 201);
    let sandbox = id_of(&fork(&daemon));
    let long = "x".repeat(65);
    for name in [
        "../up",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\0b",
        ".draft-base",
        "-rf",
        "a b",
        "ä",
        &long,
    ] {
        for (path, body) in [
            (
                "/v1/snapshots".to_owned(),
                json!({"tag": name, "image": "x"}),
            ),
            ("/v1/sandboxes".to_owned(), json!({"snapshot_tag": name})),
            (
                format!("/v1/sandboxes/{sandbox}/branch"),
                json!({"tag": name}),
            ),
            ("/v1/snapshots/base/compact".to_owned(), json!({"to": name})),
            (
                "/v1/workspaces".to_owned(),
                json!({"name": name, "snapshot_tag": "base"}),
            ),
            (
                "/v1/workspaces".to_owned(),
                json!({"name": "w", "snapshot_tag": name}),
            ),
        ] {
            let refused = ask(&daemon, "POST", &path, &body);
            assert_eq!(refused.status, 400, "{path} {name:?}");
            assert_eq!(code(&refused), "invalid_argument", "{path} {name:?}");
        }
    }
    for image in ["../x", "/etc", "..", "a/b"] {
        let refused = ask(
            &daemon,
            "POST",
            "/v1/snapshots",
            &json!({"tag": "t", "image": image}),
        );
        assert!(
            matches!(refused.status, 400 | 404),
            "{image}: {}",
            refused.status
        );
    }
    let mut entries: Vec<_> = std::fs::read_dir(dir.path().join("data/snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    entries.sort();
    assert_eq!(entries, ["base"]);
}

/// Makes a certificate; `None` where the tool for it is missing.
fn certificate(dir: &Path, name: &str) -> Option<()> {
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
        ])
        .args(["-subj", &format!("/CN={name}")])
        .arg("-keyout")
        .arg(dir.join("key.pem"))
        .arg("-out")
        .arg(dir.join("cert.pem"))
        .output();
    if !made.is_ok_and(|made| made.status.success()) {
        println!("skipped: openssl, which makes the certificate, is not here");
        return None;
    }
    Some(())
}

/// Whose certificate is shown.
fn shown(port: u16) -> String {
    let output = Command::new("openssl")
        .args(["s_client", "-connect", &format!("127.0.0.1:{port}")])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let subject = text.lines().find_map(|line| line.strip_prefix("subject="));
    subject.unwrap_or_default().replace(' ', "")
}

#[test]
fn a_new_certificate_is_shown_without_a_restart() {
    let dir = TempDir::new().unwrap();
    if certificate(dir.path(), "first").is_none() {
        return;
    }
    let addr = crate::daemon::free_address();
    let mut child = fake()
        .args(["--bind", &addr.to_string(), "--audit-log", "none"])
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .arg("--run-dir")
        .arg(dir.path().join("run"))
        .arg("--tls-cert")
        .arg(dir.path().join("cert.pem"))
        .arg("--tls-key")
        .arg(dir.path().join("key.pem"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let becomes = |name: &str| {
        let begun = Instant::now();
        while shown(addr.port()) != format!("CN={name}") {
            assert!(begun.elapsed() < PATIENCE, "{name} is never shown");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    becomes("first");
    // Half of a renewal: certificate and key do not fit, and the old pair stays.
    std::fs::write(dir.path().join("cert.pem"), "not a certificate").unwrap();
    let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
    kill_process(pid, Signal::HUP).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(shown(addr.port()), "CN=first");
    certificate(dir.path(), "second").unwrap();
    becomes("second");
    child.kill().unwrap();
    child.wait().unwrap();
}
