//! `kill -9` of the daemon, at every place the heart and the workspaces name, and at any moment of a fan-out of
//! real VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Parser;
use forkd_daemon::{Config, ServeArgs};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Answer;
use crate::daemon::{Daemon, PATIENCE, Sweep, Told, check};
use crate::engine::Host;

/// Walks at once; more only slow each other down.
const WALKERS: usize = 3;

/// Set for the test program when it is to be a daemon: tells how.
const BE_A_DAEMON: &str = "FORKD_TEST_BE_A_DAEMON";

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
}

/// Not a test: what [`hosted`] runs. A daemon whose guests are processes cannot be the program we ship, and one that
/// is killed cannot be this process.
#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_of_the_walks() {
    if std::env::var_os(BE_A_DAEMON).is_none() {
        return;
    }
    let config = Config::from_args(Cli::parse_from(["serve"]).serve).unwrap();
    let engine = std::sync::Arc::new(Host::default());
    forkd_daemon::serve_with(config, engine).await.unwrap();
}

/// The daemon over guests that are processes of this machine and outlive it.
fn hosted() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(BE_A_DAEMON, "yes").env("RUST_LOG", "info");
    command.args(["killed::the_daemon_of_the_walks", "--exact", "--nocapture"]);
    command
}

/// One life of a node, as far as the daemon lives; what its client was told.
fn live(daemon: &Daemon, dir: &Path) -> Told {
    let mut told = Told::default();
    // Ends with the daemon: whatever is asked after that was never answered.
    let _ = live_until_it_ends(daemon, dir, &mut told);
    told
}

fn live_until_it_ends(daemon: &Daemon, dir: &Path, told: &mut Told) -> Option<()> {
    let file = |name: &str| {
        let path = dir.join(name);
        std::fs::write(&path, name).unwrap();
        path
    };
    let ask = |method: &str, path: &str, body: Value| -> Option<Value> {
        let answer = daemon.ask(method, path, &body)?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(answer.status < 300, "{method} {path}: {text}");
        Some(serde_json::from_str(&text).unwrap_or_default())
    };
    let snapshot = json!({"tag": "base", "kernel": file("kernel"), "rootfs": file("rootfs"),
        "initramfs": file("initramfs"), "memory_mib": 64});
    ask("POST", "/v1/snapshots", snapshot)?;
    told.snapshots.insert("base".to_owned());

    let made = daemon.fork_once(KEY, &keyed_fork())?;
    assert_eq!(made.status, 201, "{}", String::from_utf8_lossy(&made.body));
    told.forked = ids(&made);
    let [first, second] = <[String; 2]>::try_from(told.forked.clone()).unwrap();
    told.sandboxes.extend(told.forked.clone());
    ask("POST", &format!("/v1/sandboxes/{first}/pause"), Value::Null)?;
    ask(
        "POST",
        &format!("/v1/sandboxes/{first}/resume"),
        Value::Null,
    )?;
    ask(
        "POST",
        &format!("/v1/sandboxes/{first}/branch"),
        json!({"tag": "child"}),
    )?;
    told.snapshots.insert("child".to_owned());
    told.sandboxes.remove(&second);
    ask("DELETE", &format!("/v1/sandboxes/{second}"), Value::Null)?;
    told.killed.insert(second);

    ask(
        "POST",
        "/v1/workspaces",
        json!({"name": "desk", "snapshot_tag": "base"}),
    )?;
    told.workspace = true;
    for verb in ["suspend", "resume", "suspend", "resume"] {
        ask("POST", &format!("/v1/workspaces/desk/{verb}"), json!({}))?;
    }
    told.workspace = false;
    ask("DELETE", "/v1/workspaces/desk", Value::Null)?;
    Some(())
}

/// The key of the fork in [`live`].
const KEY: &str = "the fork of a life";

fn keyed_fork() -> Value {
    json!({"snapshot_tag": "base", "n": 2, "metadata": {"made": "once"}})
}

fn ids(forked: &Answer) -> Vec<String> {
    let made: Vec<Value> = serde_json::from_slice(&forked.body).unwrap();
    let id = |made: &Value| made["id"].as_str().unwrap().to_owned();
    made.iter().map(id).collect()
}

/// Whoever repeats the fork of a life gets what it made, or has it made now; never both.
fn the_fork_is_done_once(daemon: &Daemon, told: &Told, place: &str) {
    if !told.snapshots.contains("base") {
        return;
    }
    let again = daemon.fork_once(KEY, &keyed_fork()).unwrap();
    let text = String::from_utf8_lossy(&again.body).into_owned();
    assert_eq!(again.status, 201, "{place}: {text}");
    let made = ids(&again);
    if !told.forked.is_empty() {
        assert_eq!(made, told.forked, "{place}");
        assert_eq!(again.header("forkd-replayed"), Some("true"), "{place}");
    }
    let listed = daemon.get("/v1/sandboxes?metadata=made=once");
    let listed = listed.as_array().unwrap().iter();
    let listed: BTreeSet<&str> = listed.map(|s| s["id"].as_str().unwrap()).collect();
    let made: BTreeSet<&str> = made.iter().map(String::as_str).collect();
    if told.forked.is_empty() {
        assert_eq!(listed, made, "{place}: {}", daemon.log());
    }
    assert!(listed.is_subset(&made), "{place}: {}", daemon.log());
}

/// Every place that is reached in a life, as often as it is reached.
fn places() -> BTreeMap<String, usize> {
    let dir = TempDir::new().unwrap();
    let _sweep = Sweep(dir.path().to_owned());
    let trace = dir.path().join("trace");
    let daemon = Daemon::start(dir.path(), &|| {
        let mut command = hosted();
        command.env("FORKD_CRASH_TRACE", &trace);
        command
    });
    let told = live(&daemon, dir.path());
    assert_eq!(
        told.killed.len(),
        1,
        "the life ends early: {}",
        daemon.log()
    );
    check(&daemon, &told, "no crash");
    let mut places = BTreeMap::new();
    for place in std::fs::read_to_string(&trace).unwrap().lines() {
        *places.entry(place.to_owned()).or_default() += 1;
    }
    places
}

/// Dies at a place, for the n-th time it is reached, and sees what the next daemon makes of it.
fn die_at(place: &str, nth: usize) {
    let place = format!("{place}#{nth}");
    let dir = TempDir::new().unwrap();
    let _sweep = Sweep(dir.path().to_owned());
    let mut daemon = Daemon::start(dir.path(), &|| {
        let mut command = hosted();
        command.env("FORKD_CRASH_AT", &place);
        command
    });
    let told = live(&daemon, dir.path());
    let begun = Instant::now();
    while !daemon.has_ended() {
        assert!(
            begun.elapsed() < PATIENCE,
            "{place}: the daemon did not die"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    daemon.kill();
    let daemon = Daemon::start(dir.path(), &hosted);
    check(&daemon, &told, &place);
    the_fork_is_done_once(&daemon, &told, &place);
    workspace_goes_on(&daemon, &told, &place);
    all_can_be_removed(&daemon, &place);
}

/// A workspace whose creation was answered is there, and goes on from wherever it was left.
fn workspace_goes_on(daemon: &Daemon, told: &Told, place: &str) {
    let listed = daemon.get("/v1/workspaces");
    let listed = listed.as_array().unwrap();
    assert!(!told.workspace || listed.len() == 1, "{place}: {listed:?}");
    for workspace in listed {
        if workspace["status"] != "running" {
            let resumed = daemon.ask("POST", "/v1/workspaces/desk/resume", &Value::Null);
            let resumed = resumed.unwrap();
            let text = String::from_utf8_lossy(&resumed.body).into_owned();
            assert_eq!(resumed.status, 200, "{place}: {text}");
        }
        for verb in ["suspend", "resume"] {
            let path = format!("/v1/workspaces/desk/{verb}");
            let done = daemon.ask("POST", &path, &json!({})).unwrap();
            let text = String::from_utf8_lossy(&done.body).into_owned();
            assert_eq!(done.status, 200, "{place}: {verb}: {text}");
        }
        let removed = daemon.ask("DELETE", "/v1/workspaces/desk", &Value::Null);
        assert_eq!(removed.unwrap().status, 204, "{place}");
    }
}

fn all_can_be_removed(daemon: &Daemon, place: &str) {
    for sandbox in daemon.get("/v1/sandboxes").as_array().unwrap() {
        let path = format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap());
        let killed = daemon.ask("DELETE", &path, &Value::Null).unwrap();
        assert_eq!(killed.status, 204, "{place}");
    }
    for snapshot in daemon.get("/v1/snapshots").as_array().unwrap() {
        let tag = snapshot["tag"].as_str().unwrap();
        let path = format!("/v1/snapshots/{tag}?cascade=true");
        // The second one may have gone with the first.
        let status = daemon.ask("DELETE", &path, &Value::Null).unwrap().status;
        assert!(matches!(status, 204 | 404), "{place}: {tag}: {status}");
    }
    check(daemon, &Told::default(), place);
    assert_eq!(daemon.get("/v1/snapshots"), json!([]), "{place}");
}

#[test]
fn killed_at_every_place_it_loses_and_leaves_nothing() {
    let reached = places();
    let known: BTreeSet<String> = forkd_daemon::crash_places().into_iter().collect();
    let missed: Vec<_> = known.iter().filter(|p| !reached.contains_key(*p)).collect();
    assert!(missed.is_empty(), "never reached: {missed:?}");
    let unknown: Vec<_> = reached.keys().filter(|p| !known.contains(*p)).collect();
    assert!(unknown.is_empty(), "not in the list: {unknown:?}");
    let walks: Vec<(String, usize)> = reached
        .into_iter()
        .flat_map(|(place, times)| (1..=times).map(move |nth| (place.clone(), nth)))
        .collect();
    println!("{} places, {} walks", known.len(), walks.len());
    let walks = Mutex::new(walks);
    std::thread::scope(|scope| {
        for _ in 0..WALKERS {
            scope.spawn(|| {
                while let Some((place, nth)) = { walks.lock().unwrap().pop() } {
                    die_at(&place, nth);
                }
            });
        }
    });
}

#[test]
fn a_command_that_was_cut_off_is_not_run_again() {
    let dir = TempDir::new().unwrap();
    let _sweep = Sweep(dir.path().to_owned());
    let daemon = Daemon::start(dir.path(), &hosted);
    let file = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, name).unwrap();
        path
    };
    let snapshot = json!({"tag": "base", "kernel": file("kernel"), "rootfs": file("rootfs"),
        "initramfs": file("initramfs"), "memory_mib": 64});
    assert_eq!(
        daemon
            .ask("POST", "/v1/snapshots", &snapshot)
            .unwrap()
            .status,
        201
    );
    let made = daemon.fork_once(KEY, &keyed_fork()).unwrap();
    let exec = format!("/v1/sandboxes/{}/exec", ids(&made)[0]);
    let ran = dir.path().join("ran");
    let command = format!("echo ran >> {}; sleep 600", ran.display());
    let body = json!({"args": ["sh", "-c", command]});
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| daemon.post_once("a command", &exec, &body));
        let begun = Instant::now();
        while !ran.exists() {
            assert!(begun.elapsed() < PATIENCE, "the command does not run");
            std::thread::sleep(Duration::from_millis(10));
        }
        let pid = rustix::process::Pid::from_raw(daemon.pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        asked.join().unwrap()
    });
    assert!(answer.is_none());
    daemon.kill();
    let daemon = Daemon::start(dir.path(), &hosted);
    for _ in 0..2 {
        let again = daemon.post_once("a command", &exec, &body).unwrap();
        let text = String::from_utf8_lossy(&again.body).into_owned();
        assert_eq!(again.status, 409, "{text}");
        assert!(
            text.contains("cut off") && text.contains("a new key"),
            "{text}"
        );
    }
    assert_eq!(std::fs::read_to_string(&ran).unwrap(), "ran\n");
    // What was answered before stays as it was.
    assert_eq!(
        ids(&daemon.fork_once(KEY, &keyed_fork()).unwrap()),
        ids(&made)
    );
}

/// Rounds of the test below, unless FORKD_SOAK_ROUNDS says otherwise.
const ROUNDS: u32 = 5;
/// Real VMs in one request.
const FAN_OUT: u32 = 4;

/// The program as it is shipped, over QEMU.
fn shipped() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-controller"));
    command.args(["serve", "--engine", "qemu"]);
    command
}

#[test]
fn killed_during_a_fan_out_of_real_vms_it_leaves_nothing() {
    let Some(guest) = std::env::var_os("FORKD_TEST_GUEST") else {
        println!("skipped: FORKD_TEST_GUEST names no guest; see `make test`");
        return;
    };
    let rounds = std::env::var("FORKD_SOAK_ROUNDS").ok();
    let rounds = rounds.map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    let dir = TempDir::new().unwrap();
    let _sweep = Sweep(dir.path().to_owned());
    let mut daemon = Daemon::start(dir.path(), &shipped);
    let file = |name: &str| Path::new(&guest).join(name);
    let body = json!({"tag": "base", "kernel": file("kernel"), "initramfs": file("initramfs"),
        "rootfs": file("rootfs"), "memory_mib": 256});
    let made = daemon.ask("POST", "/v1/snapshots", &body).unwrap();
    assert_eq!(made.status, 201, "{}", String::from_utf8_lossy(&made.body));
    let fork = json!({"snapshot_tag": "base", "n": FAN_OUT});
    // Twice: the first makes the template.
    let mut whole = Duration::ZERO;
    for _ in 0..2 {
        let begun = Instant::now();
        let made = daemon.ask("POST", "/v1/sandboxes", &fork).unwrap();
        assert_eq!(made.status, 201, "{}", String::from_utf8_lossy(&made.body));
        whole = begun.elapsed();
        kill_all(&daemon);
    }
    let (mut early, mut late) = (0, 0);
    for round in 0..rounds {
        // Evenly over the whole, and a little beyond it; never twice at the same instant.
        let part = (f64::from(round) * 0.618_034 + 0.1).fract();
        let place = format!("round {round}, {:.0} % of {whole:?}", part * 110.0);
        let key = format!("round {round}");
        let answer = std::thread::scope(|scope| {
            let asked = scope.spawn(|| daemon.fork_once(&key, &fork));
            std::thread::sleep(whole.mul_f64(part * 1.1));
            let pid = rustix::process::Pid::from_raw(daemon.pid().cast_signed()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            asked.join().unwrap()
        });
        daemon.kill();
        let mut told = Told::default();
        told.snapshots.insert("base".to_owned());
        match answer {
            Some(answer) => {
                late += 1;
                told.forked = ids(&answer);
                told.sandboxes.extend(told.forked.clone());
            }
            None => early += 1,
        }
        daemon = Daemon::start(dir.path(), &shipped);
        check(&daemon, &told, &place);
        let again = daemon.fork_once(&key, &fork).unwrap();
        assert_eq!(again.status, 201, "{place}");
        assert!(
            told.forked.is_empty() || ids(&again) == told.forked,
            "{place}"
        );
        told.sandboxes.extend(ids(&again));
        check(&daemon, &told, &place);
        let listed = daemon.get("/v1/sandboxes");
        assert_eq!(
            listed.as_array().unwrap().len(),
            FAN_OUT as usize,
            "{place}: {listed}"
        );
        kill_all(&daemon);
        check(&daemon, &Told::default(), &place);
    }
    println!("{rounds} rounds: {early} before the answer, {late} after it");
}

fn kill_all(daemon: &Daemon) {
    for sandbox in daemon.get("/v1/sandboxes").as_array().unwrap() {
        let path = format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap());
        let killed = daemon.ask("DELETE", &path, &Value::Null).unwrap();
        assert_eq!(killed.status, 204);
    }
}
