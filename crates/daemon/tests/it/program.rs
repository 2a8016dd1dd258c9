//! The daemon with its listener: as a program where signals matter, within the test where guests do.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use forkd_daemon::{Config, ServeArgs};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::engine::Host;

const PROGRAM: &str = env!("CARGO_BIN_EXE_forkd-controller");
const TOKEN: &str = "a-token-that-is-long-enough";

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
}

/// A loopback address that was free a moment ago.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

fn flags(dir: &Path, bind: SocketAddr) -> Vec<String> {
    let path = |name: &str| dir.join(name).display().to_string();
    let flags = [
        ("--bind", bind.to_string()),
        ("--data-dir", path("data")),
        ("--run-dir", path("run")),
        ("--audit-log", path("audit.log")),
        ("--net", "none".to_owned()),
    ];
    flags
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
}

/// The program, ended with the test.
struct Daemon {
    child: Child,
    addr: SocketAddr,
    dir: TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(more: &[&str]) -> Daemon {
        let dir = TempDir::new().unwrap();
        let addr = free_address();
        let child = Command::new(PROGRAM)
            .arg("serve")
            .args(flags(dir.path(), addr))
            .args(more)
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Daemon { child, addr, dir };
        for _ in 0..500 {
            if TcpStream::connect(addr).is_ok() {
                return daemon;
            }
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("{status}: {}", daemon.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("does not listen: {}", daemon.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }
}

/// Sends bytes and reads until the other side closes or nothing comes for a while.
fn exchange(addr: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream.write_all(bytes.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn get(addr: SocketAddr, path: &str, token: &str) -> String {
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
    exchange(
        addr,
        &format!("{head}authorization: Bearer {token}\r\n\r\n"),
    )
}

/// What the program says to these flags, and to defaults for those it is not given.
fn run(args: &[&str]) -> Output {
    let dir = TempDir::new().unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("serve").args(args);
    for pair in flags(dir.path(), free_address()).chunks(2) {
        if !args.contains(&pair[0].as_str()) {
            command.args(pair);
        }
    }
    command.stdin(Stdio::null()).output().unwrap()
}

fn holds(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "did not happen: {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_cannot_be_served_is_refused_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "REPLACE_ME_WITH_32_BYTES_BASE64").unwrap();
    let token = token.to_str().unwrap();
    for (args, reason) in [
        (&["--bind", "0.0.0.0:0"][..], "--token-file"),
        (&["--token-file", token], "placeholder"),
        (&["--token-file", "/nowhere/token"], "/nowhere/token"),
        (&["--tls-cert", "/nowhere"], "only go together"),
        (&["--tls-cert", token, "--tls-key", token], "certificate"),
        (&["--branch-concurrency", "0"], "at least 1"),
        (&["--state", "/proc/forkd/state.db"], "/proc/forkd"),
        (&["--audit-log", "/proc/audit.log"], "/proc/audit.log"),
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?}");
        assert!(said.contains(reason), "{args:?}: {said}");
    }
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused_and_names_the_first() {
    let daemon = Daemon::start(&[]);
    let second = Command::new(PROGRAM)
        .arg("serve")
        .args(flags(daemon.dir.path(), free_address()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success());
    assert!(said.contains(&daemon.child.id().to_string()), "{said}");
    assert!(get(daemon.addr, "/healthz", "").contains("{\"ok\":true}"));
}

#[test]
fn tokens_are_reloaded_and_the_audit_log_is_reopened() {
    let dir = TempDir::new().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let daemon = Daemon::start(&["--token-file", token.to_str().unwrap()]);
    // Whoever reloads a daemon that has hardly begun does not end it.
    daemon.signal(Signal::HUP);
    assert!(get(daemon.addr, "/version", TOKEN).starts_with("HTTP/1.1 200"));

    std::fs::write(&token, "short").unwrap();
    daemon.signal(Signal::HUP);
    holds("the bad token is reported", || {
        daemon.log().contains("tokens not reloaded")
    });
    assert!(get(daemon.addr, "/version", TOKEN).starts_with("HTTP/1.1 200"));

    let log = daemon.dir.path().join("audit.log");
    std::fs::rename(&log, daemon.dir.path().join("audit.log.1")).unwrap();
    let second = "another-token-that-is-long-enough";
    std::fs::write(&token, second).unwrap();
    daemon.signal(Signal::HUP);
    holds("the new token counts", || {
        get(daemon.addr, "/version", second).starts_with("HTTP/1.1 200")
    });
    assert!(get(daemon.addr, "/version", TOKEN).starts_with("HTTP/1.1 401"));
    assert!(std::fs::read_to_string(&log).unwrap().contains("/version"));
    assert!(!daemon.log().contains(second) && !daemon.log().contains(TOKEN));

    // And without a signal, because the file has changed.
    std::fs::write(&token, TOKEN).unwrap();
    holds("the change is seen", || {
        get(daemon.addr, "/version", TOKEN).starts_with("HTTP/1.1 200")
    });
}

#[test]
fn a_signal_ends_it_and_nothing_is_left_locked() {
    let mut daemon = Daemon::start(&[]);
    daemon.signal(Signal::TERM);
    let mut status = None;
    holds("the daemon ends", || {
        status = daemon.child.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success(), "{}", daemon.log());
    assert!(daemon.log().contains("draining"), "{}", daemon.log());
    assert!(!daemon.log().contains('\u{1b}'), "colours in a file");
}

#[test]
fn connections_beyond_the_limit_are_told_so_and_idle_ones_do_no_harm() {
    let daemon = Daemon::start(&["--max-connections", "50"]);
    let idle: Vec<TcpStream> = (0..50)
        .map(|_| TcpStream::connect(daemon.addr).unwrap())
        .collect();
    holds("the limit is reached", || {
        let answer = exchange(daemon.addr, "");
        answer.starts_with("HTTP/1.1 503") && answer.contains("\"code\":\"busy\"")
    });
    drop(idle);
    holds("places are free again", || {
        get(daemon.addr, "/healthz", "").starts_with("HTTP/1.1 200")
    });
}

#[test]
fn garbage_and_half_requests_are_answered_or_dropped() {
    let daemon = Daemon::start(&[]);
    let long = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(1 << 20));
    for bytes in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        &long,
        "POST /v1/sandboxes HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    ] {
        let answer = exchange(daemon.addr, bytes);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{answer}"
        );
    }
    assert!(get(daemon.addr, "/healthz", "").contains("{\"ok\":true}"));
}

#[test]
fn tls_is_served_and_plain_http_is_not() {
    let dir = TempDir::new().unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
        ])
        .args([
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output();
    if !made.is_ok_and(|made| made.status.success()) {
        println!("skipped: openssl, which makes the certificate, is not here");
        return;
    }
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let daemon = Daemon::start(&["--tls-cert", cert, "--tls-key", key]);
    for version in ["-tls1_2", "-tls1_3"] {
        let mut client = Command::new("openssl")
            .args([
                "s_client",
                "-quiet",
                "-verify_return_error",
                "-CAfile",
                cert,
                version,
            ])
            .args(["-connect", &daemon.addr.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let ask = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        client.stdin.as_mut().unwrap().write_all(ask).unwrap();
        let mut answer = String::new();
        client
            .stdout
            .as_mut()
            .unwrap()
            .read_to_string(&mut answer)
            .unwrap();
        client.wait().unwrap();
        assert!(answer.contains("{\"ok\":true}"), "{version}: {answer}");
    }
    assert!(!get(daemon.addr, "/healthz", "").contains("HTTP/1.1 200"));
}

/// The stock client of forkd 0.5 for Python, unmodified, drives a daemon with real agents.
#[tokio::test(flavor = "multi_thread")]
async fn the_stock_python_client_works_unchanged() {
    let dir = TempDir::new().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    for file in ["kernel", "initramfs", "rootfs"] {
        std::fs::write(dir.path().join(file), file).unwrap();
    }
    let installed = Command::new("pip")
        .args(["install", "--quiet", "--no-deps", "--target"])
        .arg(dir.path().join("site"))
        .arg("forkd==0.5.3")
        .output();
    if !installed
        .as_ref()
        .is_ok_and(|installed| installed.status.success())
    {
        println!("skipped: the package forkd 0.5.3 cannot be had: {installed:?}");
        return;
    }
    let addr = free_address();
    let mut args = vec!["serve".to_owned()];
    args.extend(flags(dir.path(), addr));
    args.extend(["--token-file".to_owned(), token.display().to_string()]);
    let config = Config::from_args(Cli::try_parse_from(args).unwrap().serve).unwrap();
    let daemon = tokio::spawn(forkd_daemon::serve_with(config, Arc::new(Host::default())));
    crate::world::until("it listens", async || TcpStream::connect(addr).is_ok()).await;

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/stock_client.py");
    let output = tokio::process::Command::new("python3")
        .arg(script)
        .arg(dir.path())
        .env("PYTHONPATH", dir.path().join("site"))
        .env("FORKD_URL", format!("http://{addr}"))
        .env("FORKD_TOKEN", TOKEN)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let summary: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(summary["calls"], 14);
    daemon.abort();
}

/// What is shipped for systemd and Kubernetes is accepted by them and by the daemon's own flags.
#[test]
fn the_packaging_is_sound() {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let unit = std::fs::read_to_string(packaging.join("systemd/forkd-controller.service")).unwrap();
    let command = unit.replace("\\\n", " ");
    let command = command
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .unwrap();
    let mut words = command.split_whitespace();
    assert_eq!(words.next(), Some("/usr/bin/forkd-controller"));
    let parsed = Config::from_args(Cli::try_parse_from(words).unwrap().serve).unwrap();
    assert!(
        parsed.drain < Duration::from_secs(45),
        "TimeoutStopSec must outlast the drain"
    );
    for line in [
        "KillMode=process",
        "Delegate=yes",
        "RuntimeDirectoryPreserve=yes",
    ] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }

    let manifest = std::fs::read_to_string(packaging.join("k8s/forkd-controller.yaml")).unwrap();
    let args = manifest
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- --"));
    let args = args.map(|arg| format!("--{arg}"));
    let args = std::iter::once("serve".to_owned()).chain(args);
    let parsed = Config::from_args(Cli::try_parse_from(args).unwrap().serve).unwrap();
    assert_eq!(parsed.bind.to_string(), "0.0.0.0:8889");
    assert!(parsed.token_file.is_some());

    let dir = TempDir::new().unwrap();
    let copy = dir.path().join("forkd-controller.service");
    std::fs::write(&copy, unit.replace("/usr/bin/forkd-controller", PROGRAM)).unwrap();
    match Command::new("systemd-analyze")
        .arg("verify")
        .arg(&copy)
        .output()
    {
        Err(error) => println!("skipped: systemd-analyze is not here: {error}"),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && said.is_empty(), "{said}");
        }
    }
}
