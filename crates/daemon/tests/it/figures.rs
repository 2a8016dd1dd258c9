//! The costs of the interface, with room for a debug build on a machine that does much else: what fails here has become
//! slower by a multiple. `make bench-api` measures.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Client;
use crate::daemon::Daemon;

/// Ten times what a release build may take on a quiet machine, and more.
const FORKS_AT_MOST: Duration = Duration::from_millis(1500);
const EXECS_A_SECOND: f64 = 150.0;
const HEALTH_P99: Duration = Duration::from_millis(300);
/// A release build takes 17 MiB; a debug build maps more of itself.
const IDLE_KIB: u64 = if cfg!(debug_assertions) { 48 } else { 30 } * 1024;

fn fork(client: &mut Client, n: u32) -> (Vec<String>, Duration) {
    let begun = Instant::now();
    let body = json!({"snapshot_tag": "base", "n": n}).to_string();
    let answer = client.ask("POST", "/v1/sandboxes", &body).unwrap();
    let took = begun.elapsed();
    assert_eq!(answer.status, 201);
    let made: Vec<Value> = serde_json::from_slice(&answer.body).unwrap();
    let id = |made: &Value| made["id"].as_str().unwrap().to_owned();
    (made.iter().map(id).collect(), took)
}

fn kill(client: &mut Client, ids: &[String]) {
    for id in ids {
        let path = format!("/v1/sandboxes/{id}");
        assert_eq!(client.ask("DELETE", &path, "").unwrap().status, 204);
    }
}

/// Requests a second, from four clients at once.
fn exec_rate(daemon: &Daemon, ids: &[String]) -> f64 {
    let length = Duration::from_secs(2);
    let count = |id: &String| {
        let mut client = Client::connect(daemon.addr).unwrap();
        let path = format!("/v1/sandboxes/{id}/exec");
        let body = json!({"args": ["echo", "hello"]}).to_string();
        let (begun, mut count) = (Instant::now(), 0_u32);
        while begun.elapsed() < length {
            assert_eq!(client.ask("POST", &path, &body).unwrap().status, 200);
            count += 1;
        }
        count
    };
    let total: u32 = std::thread::scope(|scope| {
        let threads: Vec<_> = ids
            .iter()
            .map(|id| scope.spawn(move || count(id)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    f64::from(total) / length.as_secs_f64()
}

/// The slowest but one in a hundred, while a thousand are made.
fn health_p99(daemon: &Daemon, client: &mut Client) -> (Duration, Vec<String>) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let probes = scope.spawn(|| {
            let (mut client, mut took) = (Client::connect(daemon.addr).unwrap(), vec![]);
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                assert_eq!(client.ask("GET", "/healthz", "").unwrap().status, 200);
                took.push(begun.elapsed());
                std::thread::sleep(Duration::from_millis(2));
            }
            took.sort();
            took[(took.len() - 1) * 99 / 100]
        });
        let (ids, _) = fork(client, 1000);
        stop.store(true, Ordering::Relaxed);
        (probes.join().unwrap(), ids)
    })
}

#[test]
fn forks_commands_and_probes_cost_little() {
    let dir = TempDir::new().unwrap();
    let daemon = Daemon::start(dir.path(), &|| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-controller"));
        command
            .args(["serve", "--engine", "fake"])
            .env("RUST_LOG", "warn");
        command
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(kib <= IDLE_KIB, "an idle daemon takes {kib} KiB");

    let file = dir.path().join("file");
    std::fs::write(&file, "file").unwrap();
    let mut client = Client::connect(daemon.addr).unwrap();
    let body = json!({"tag": "base", "kernel": file, "initramfs": file, "rootfs": file,
        "memory_mib": 64});
    let made = client.ask("POST", "/v1/snapshots", &body.to_string());
    assert_eq!(made.unwrap().status, 201);

    let mut took = vec![];
    for _ in 0..5 {
        let (ids, time) = fork(&mut client, 100);
        took.push(time);
        kill(&mut client, &ids);
    }
    took.sort();
    assert!(took[2] <= FORKS_AT_MOST, "100 forks take {took:?}");
    let (ids, _) = fork(&mut client, 4);
    let rate = exec_rate(&daemon, &ids);
    assert!(rate >= EXECS_A_SECOND, "{rate} commands a second");
    kill(&mut client, &ids);
    let (p99, ids) = health_p99(&daemon, &mut client);
    assert!(
        p99 <= HEALTH_P99,
        "/healthz takes {p99:?} while 1000 are made"
    );
    kill(&mut client, &ids);
    println!(
        "idle {kib} KiB; 100 forks {:?}; {rate:.0} commands/s; /healthz {p99:?}",
        took[2]
    );
}
