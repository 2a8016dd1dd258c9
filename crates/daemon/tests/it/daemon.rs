//! A daemon as a process of its own, that can be killed and started again over the same files, and what must hold
//! after that.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Answer, Client};

/// How long anything may take on a machine that does much else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How the daemon is started: the program with its arguments, without those that say where.
pub(crate) type Make<'a> = &'a dyn Fn() -> Command;

/// A running daemon; killed with the value.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) addr: SocketAddr,
    dir: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The settings of `serve` that keep everything below a directory; every flag is also a variable.
fn settings(dir: &Path, bind: SocketAddr) -> [(&'static str, String); 5] {
    let path = |name: &str| dir.join(name).display().to_string();
    [
        ("FORKD_BIND", bind.to_string()),
        ("FORKD_DATA_DIR", path("data")),
        ("FORKD_RUN_DIR", path("run")),
        ("FORKD_AUDIT_LOG", path("audit.log")),
        // What these tests kill is not started again, so nobody would remove its networks.
        ("FORKD_NET", "none".to_owned()),
    ]
}

/// A loopback address that was free a moment ago.
pub(crate) fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

impl Daemon {
    /// Starts it over a directory and waits until it serves.
    pub(crate) fn start(dir: &Path, make: Make<'_>) -> Daemon {
        Daemon::try_start(dir, make).unwrap_or_else(|why| panic!("does not serve: {why}"))
    }

    /// The same; or what it said before it ended.
    pub(crate) fn try_start(dir: &Path, make: Make<'_>) -> Result<Daemon, String> {
        let addr = free_address();
        let log = dir.join("log");
        let child = make()
            .envs(settings(dir, addr))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let dir = dir.to_owned();
        let mut daemon = Daemon { child, addr, dir };
        let begun = Instant::now();
        loop {
            let ready = daemon.ask("GET", "/readyz", &Value::Null);
            if ready.is_some_and(|answer| answer.status == 200) {
                return Ok(daemon);
            }
            if daemon.has_ended() || begun.elapsed() > PATIENCE {
                return Err(daemon.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// `kill -9`, or the end it has come to by itself.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks on a new connection. Nothing where the daemon went away meanwhile.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> Option<Answer> {
        let text = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        Client::connect(self.addr)
            .and_then(|mut client| client.ask(method, path, &text))
            .ok()
    }

    /// Asks with an idempotency key.
    pub(crate) fn post_once(&self, key: &str, path: &str, body: &Value) -> Option<Answer> {
        let mut client = Client::connect(self.addr).ok()?;
        client.header("idempotency-key", key);
        client.ask("POST", path, &body.to_string()).ok()
    }

    /// Forks with an idempotency key.
    pub(crate) fn fork_once(&self, key: &str, body: &Value) -> Option<Answer> {
        self.post_once(key, "/v1/sandboxes", body)
    }

    /// The body of an answer that must be a success.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Value {
        let answer = self.ask("GET", path, &Value::Null);
        let answer = answer.unwrap_or_else(|| panic!("no answer: {}", self.log()));
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 200, "{path}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Whether a command runs in a sandbox.
    pub(crate) fn answers(&self, id: &str) -> Result<(), String> {
        let body = json!({"args": ["echo", "alive"]});
        let answer = self.ask("POST", &format!("/v1/sandboxes/{id}/exec"), &body);
        let answer = answer.ok_or("no answer")?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        match answer.status == 200 && text.contains("alive\\n") {
            true => Ok(()),
            false => Err(text),
        }
    }
}

/// What a client was told, and so may rely on.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) snapshots: BTreeSet<String>,
    pub(crate) sandboxes: BTreeSet<String>,
    pub(crate) killed: BTreeSet<String>,
    /// What a fork with a key was answered.
    pub(crate) forked: Vec<String>,
    /// Whether there is a workspace.
    pub(crate) workspace: bool,
}

/// What must hold once a daemon has taken over from one that was killed: what clients were told is true, what
/// is listed works, and nothing is there that is not listed.
pub(crate) fn check(daemon: &Daemon, told: &Told, place: &str) {
    let listed = daemon.get("/v1/snapshots");
    let mut snapshots = BTreeSet::new();
    for snapshot in listed.as_array().unwrap() {
        assert_eq!(snapshot["status"], "ready", "{place}: {snapshot}");
        snapshots.insert(snapshot["tag"].as_str().unwrap().to_owned());
    }
    assert!(snapshots.is_superset(&told.snapshots), "{place}: {listed}");

    let listed = daemon.get("/v1/sandboxes");
    let (mut live, mut pids) = (BTreeSet::new(), BTreeSet::new());
    for sandbox in listed.as_array().unwrap() {
        let id = sandbox["id"].as_str().unwrap().to_owned();
        if sandbox["state"] == "paused" {
            let path = format!("/v1/sandboxes/{id}/resume");
            let resumed = daemon.ask("POST", &path, &Value::Null).unwrap();
            assert_eq!(resumed.status, 200, "{place}");
        }
        if let Err(why) = daemon.answers(&id) {
            panic!("{place}: {id} does not answer: {why}\n{}", daemon.log());
        }
        pids.insert(u32::try_from(sandbox["pid"].as_u64().unwrap()).unwrap());
        live.insert(id);
    }
    assert!(
        live.is_superset(&told.sandboxes),
        "{place}: {listed}\n{}",
        daemon.log()
    );
    assert!(live.is_disjoint(&told.killed), "{place}: {listed}");
    nothing_else(daemon, &snapshots, &live, &pids, place);
}

fn nothing_else(
    daemon: &Daemon,
    snapshots: &BTreeSet<String>,
    live: &BTreeSet<String>,
    pids: &BTreeSet<u32>,
    place: &str,
) {
    let dir = &daemon.dir;
    let run: BTreeSet<String> = names(&dir.join("run")).into_iter().collect();
    assert!(
        run.is_subset(live),
        "{place}: left in the run directory: {run:?}"
    );
    let mut left = names(&dir.join("data/snapshots"));
    left.retain(|name| !snapshots.contains(name) && name != ".lock" && name != ".templates");
    assert!(
        left.is_empty(),
        "{place}: left beside the snapshots: {left:?}"
    );
    let mut strangers = users_of(dir);
    strangers.retain(|(pid, _)| !pids.contains(pid) && *pid != daemon.pid());
    assert!(strangers.is_empty(), "{place}: orphans: {strangers:?}");
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

/// Processes that name a directory on their command line.
pub(crate) fn users_of(dir: &Path) -> Vec<(u32, String)> {
    let dir = dir.display().to_string();
    let mut found = vec![];
    for name in names(Path::new("/proc")) {
        let Ok(pid) = name.parse() else { continue };
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(&dir) && pid != std::process::id() {
            found.push((pid, line));
        }
    }
    found
}

/// Kills what a failed test has left.
pub(crate) struct Sweep(pub(crate) PathBuf);

impl Drop for Sweep {
    fn drop(&mut self) {
        for (pid, _) in users_of(&self.0) {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}
