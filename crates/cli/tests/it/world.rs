//! A node of a test's own: directories, programs, and the proof that nothing is left of it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use forkd_host::file::LockFile;
use forkd_slot::registry::{self, Registry};
use serde_json::Value;

/// Guests in software emulation, with other tests beside them.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The image every test boots.
pub(crate) const IMAGE: &str = "python3-numpy";
/// The snapshot that [`World::seeded`] brings.
pub(crate) const SEED: &str = "seed";

/// A node of a test's own. Kept for inspection when the test fails.
pub(crate) struct World {
    dir: Option<tempfile::TempDir>,
    images: PathBuf,
}

/// A daemon, killed when dropped.
pub(crate) struct Daemon {
    process: Child,
    pub(crate) url: String,
    log: PathBuf,
}

/// What a program said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// Asserts success; gives standard output.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.out
    }

    /// Asserts a failure with this exit code, whose message holds `parts`, with a remedy.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(self.err.contains("error: "), "{self:#?}");
        for part in parts {
            assert!(self.err.contains(part), "no {part:?} in {self:#?}");
        }
        assert!(!self.err.contains("panicked"), "{self:#?}");
    }
}

impl World {
    /// A node without snapshots, or `None` where guests cannot be booted.
    pub(crate) fn new() -> Option<World> {
        let Some(images) = std::env::var_os("FORKD_TEST_IMAGES").map(PathBuf::from) else {
            println!("skipped: FORKD_TEST_IMAGES does not name an image store; see `make test`");
            return None;
        };
        assert!(
            images.join("images").join(IMAGE).is_dir(),
            "no {IMAGE} in {}",
            images.display()
        );
        // Short, because the paths of sockets are bounded.
        let dir = tempfile::Builder::new().prefix("fk").tempdir().unwrap();
        Some(World {
            dir: Some(dir),
            images,
        })
    }

    /// A node with a snapshot named [`SEED`], made once and copied from then on.
    pub(crate) fn seeded() -> Option<World> {
        let world = World::new()?;
        let digest = world.digest();
        let seeds = world.images.with_extension("seeds");
        fs::create_dir_all(&seeds).unwrap();
        let seed = seeds.join(format!("{digest}-with-network"));
        let _lock = LockFile::wait(&seeds.join("lock")).unwrap();
        if !seed.is_dir() {
            let warm = "import numpy; inherited = 41";
            world
                .run(["snapshot", "--tag", SEED, "--image", IMAGE, "--warm", warm])
                .ok();
            let partial = seeds.join("partial");
            let _ = fs::remove_dir_all(&partial);
            copy(&world.data().join("snapshots").join(SEED), &partial);
            fs::rename(&partial, &seed).unwrap();
            return Some(world);
        }
        let snapshots = world.data().join("snapshots");
        fs::create_dir_all(&snapshots).unwrap();
        copy(&seed, &snapshots.join(SEED));
        Some(world)
    }

    fn digest(&self) -> String {
        let list: Value = serde_json::from_str(&self.run(["image", "ls", "--json"]).ok()).unwrap();
        let images = list.as_array().unwrap();
        let image = images.iter().find(|image| image["name"] == IMAGE).unwrap();
        image["digest"].as_str().unwrap()[..16].to_owned()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    pub(crate) fn snapshot(&self, tag: &str) -> PathBuf {
        self.data().join("snapshots").join(tag)
    }

    /// The control groups of this node's machines.
    pub(crate) fn groups(&self) -> Vec<PathBuf> {
        use std::os::unix::fs::MetadataExt;
        let Ok(home) = fs::metadata(self.data()) else {
            return vec![];
        };
        let node = format!("forkd/node-{:x}-{:x}", home.dev(), home.ino());
        let Some(mount) = forkd_host::cgroup::mount_point() else {
            return vec![];
        };
        let entries = fs::read_dir(mount.join(node))
            .into_iter()
            .flatten()
            .flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect()
    }

    /// The network slots of this node.
    pub(crate) fn slots(&self) -> Vec<u32> {
        let owner = self.data().join("state.db").display().to_string();
        let registry = Registry::open(Path::new(registry::DIRECTORY), &owner).unwrap();
        registry.ours().unwrap()
    }

    /// The program with this node's places and without a daemon.
    pub(crate) fn forkd<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkd"));
        for (name, _) in std::env::vars_os() {
            let ours = name.to_string_lossy().starts_with("FORKD_");
            if ours && name != "FORKD_AGENT" {
                command.env_remove(name);
            }
        }
        command
            .args(args)
            .env("FORKD_DATA_DIR", self.data())
            .env("FORKD_RUN_DIR", self.run_dir())
            .env("FORKD_IMAGE_ROOT", &self.images)
            .env("FORKD_URL", "none")
            // What is reached is the business of tests with a network of their own.
            .env("FORKD_NET", "none")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Said {
        finish(self.forkd(args))
    }

    /// Starts a daemon on a port of its own.
    pub(crate) fn serve(&self) -> Daemon {
        self.serve_with(&[])
    }

    /// Starts a daemon whose sandboxes have a network.
    pub(crate) fn serve_networked(&self) -> Daemon {
        self.serve_with(&["--net", "nat", "--slots", "2"])
    }

    fn serve_with(&self, more: &[&str]) -> Daemon {
        let log = self.dir().join("daemon.log");
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        let before = fs::metadata(&log).unwrap().len();
        let process = self
            .forkd(["serve", "--bind", "127.0.0.1:0", "--audit-log", "none"])
            .args(more)
            .stderr(file)
            .spawn()
            .unwrap();
        let mut daemon = Daemon {
            process,
            url: String::new(),
            log,
        };
        daemon.url = wait("the daemon to listen", || daemon.address(before));
        daemon
    }

    /// Asserts that no process, run directory or half-made snapshot is left; `tags` are the snapshots
    /// there must be.
    #[track_caller]
    pub(crate) fn assert_clean(&self, tags: &[&str]) {
        let place = self.dir().to_string_lossy().into_owned();
        let left: Vec<String> = processes()
            .into_iter()
            .filter(|p| p.contains(&place))
            .collect();
        assert!(left.is_empty(), "processes left: {left:#?}");
        // A confined machine tells nothing of its node, but is in its node's control group.
        let groups: Vec<PathBuf> = self.groups();
        assert!(groups.is_empty(), "control groups left: {groups:#?}");
        assert!(
            self.slots().is_empty(),
            "network slots left: {:?}",
            self.slots()
        );
        assert_eq!(
            names(&self.run_dir()),
            Vec::<String>::new(),
            "in the run directory"
        );
        let visible = |name: &String| !name.starts_with('.');
        let (found, hidden): (Vec<String>, Vec<String>) = names(&self.data().join("snapshots"))
            .into_iter()
            .partition(visible);
        assert_eq!(found, tags, "snapshots");
        for name in hidden {
            let path = self.data().join("snapshots").join(&name);
            assert!(
                path.is_file() || names(&path).is_empty(),
                "half-made: {name}: {:?}",
                names(&path)
            );
        }
        let listed: Value = serde_json::from_str(&self.run(["images", "--json"]).ok()).unwrap();
        let listed: Vec<&str> = listed
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["tag"].as_str().unwrap())
            .collect();
        assert_eq!(listed.len(), tags.len(), "records: {listed:?}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() && self.dir.is_some() {
            // Files help whoever looks for the cause; machines only slow down the next test.
            let place = self.dir().to_string_lossy().into_owned();
            for left in processes().into_iter().filter(|line| line.contains(&place)) {
                let pid = left.split(' ').next().unwrap_or_default();
                let _ = Command::new("kill").args(["-s", "KILL", pid]).status();
            }
            for group in self.groups() {
                let _ = fs::write(group.join("cgroup.kill"), "1");
            }
            for slot in self.slots() {
                let _ = forkd_slot::slot::remove(slot);
                let _ = fs::remove_file(Path::new(registry::DIRECTORY).join(slot.to_string()));
            }
            if let Some(dir) = self.dir.take() {
                println!("kept for inspection: {}", dir.keep().display());
            }
        }
    }
}

impl Daemon {
    fn address(&mut self, from: u64) -> Option<String> {
        if let Some(status) = self.process.try_wait().unwrap() {
            panic!(
                "the daemon ended ({status}): {}",
                fs::read_to_string(&self.log).unwrap()
            );
        }
        let log = fs::read_to_string(&self.log).unwrap();
        let log = log.get(from as usize..)?;
        let (_, rest) = log.split_once("serving addr=")?;
        let address = rest.split_whitespace().next()?;
        Some(format!("http://{address}"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Points a command at this daemon.
    pub(crate) fn at<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("FORKD_URL", &self.url)
    }

    /// Runs a command against this daemon.
    pub(crate) fn run<'a>(&self, world: &World, args: impl IntoIterator<Item = &'a str>) -> Said {
        let mut command = world.forkd(args);
        self.at(&mut command);
        finish(command)
    }

    /// Forks and gives the ids.
    #[track_caller]
    pub(crate) fn fork(&self, world: &World, tag: &str, n: u32) -> Vec<String> {
        let out = self
            .run(world, ["fork", "--tag", tag, "-n", &n.to_string()])
            .ok();
        let ids: Vec<String> = out.lines().map(str::to_owned).collect();
        assert_eq!(ids.len(), n as usize, "{out}");
        ids
    }

    /// kill -9.
    pub(crate) fn kill_hard(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Ends it politely.
    pub(crate) fn stop(mut self) {
        signal(self.pid(), "TERM");
        let status = wait("the daemon to end", || self.process.try_wait().unwrap());
        assert!(
            status.success(),
            "{status}: {}",
            fs::read_to_string(&self.log).unwrap()
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs a program to its end, but not for ever.
pub(crate) fn finish(mut command: Command) -> Said {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if ended.recv_timeout(PATIENCE * 2).is_err() {
            signal(pid, "KILL");
        }
    });
    let said = Said::from(child.wait_with_output().unwrap());
    let _ = done.send(());
    watch.join().unwrap();
    said
}

/// Sends a signal by name.
pub(crate) fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status()
        .unwrap();
    assert!(sent.success(), "kill -s {name} {pid}");
}

/// Asks until there is an answer.
#[track_caller]
pub(crate) fn wait<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads lines as they come.
pub(crate) fn lines(
    stream: impl std::io::Read + Send + 'static,
) -> std::sync::mpsc::Receiver<(Instant, String)> {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if send.send((Instant::now(), line)).is_err() {
                break;
            }
        }
    });
    receive
}

/// Command lines of all processes but our own and those that have ended.
pub(crate) fn processes() -> Vec<String> {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()) && *pid != own)
        .filter_map(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .ok()
                .map(|line| (pid, line))
        })
        .filter(|(_, line)| !line.is_empty())
        .map(|(pid, line)| {
            format!(
                "{pid} {}",
                String::from_utf8_lossy(&line).replace('\0', " ")
            )
        })
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp")
        .args(["-a", "--sparse=always", "--reflink=auto"])
        .args([from, to])
        .status()
        .unwrap();
    assert!(done.success(), "cp {} {}", from.display(), to.display());
}
