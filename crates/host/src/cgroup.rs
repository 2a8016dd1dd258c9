//! Control groups, version 2: a leaf with limits for every VM.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::block::Device;

mod headroom;
#[cfg(test)]
mod tests;

pub use headroom::{memory_headroom, own_group};

/// The controllers that limits need.
pub const CONTROLLERS: [&str; 4] = ["memory", "cpu", "pids", "io"];

/// How long the processes of a killed group may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(10);
/// The leaf that a group's own processes move into.
const VACATED: &str = "forkd-daemon";
/// How often a group is looked at again for processes that appeared while others moved.
const VACATE_ROUNDS: u32 = 16;
const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();
/// The length over which `cpu.max` counts, microseconds; the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// Why a group cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No version 2 hierarchy.
    #[error(
        "no cgroup v2 is mounted; boot with systemd.unified_cgroup_hierarchy=1, or mount it at /sys/fs/cgroup"
    )]
    NotMounted,
    /// The kernel, or whoever mounted it, does not offer a controller.
    #[error("the cgroup {} cannot limit {controller}; enable that controller in it and in every group above", .path.display())]
    Controller {
        /// The group.
        path: PathBuf,
        /// The controller.
        controller: String,
    },
    /// A step failed.
    #[error("cannot {step} the cgroup {}; this needs root, and under systemd Delegate=yes", .path.display())]
    Step {
        /// What was being done.
        step: &'static str,
        /// The group or its file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Processes did not end.
    #[error("processes in the cgroup {} do not end", .path.display())]
    Busy {
        /// The group.
        path: PathBuf,
    },
}

/// What a group may use; `None` is without limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes. Swap is refused then, or a limit would only move the trouble.
    pub memory_bytes: Option<u64>,
    /// Processor time in thousandths of one processor.
    pub cpu_milli: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Traffic with each of `disks`.
    pub io: IoRates,
    /// The disks that `io` counts for, each by itself.
    pub disks: Vec<Device>,
}

/// Traffic with one disk, each second; `None` is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoRates {
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
    /// Reads.
    pub reads: Option<u64>,
    /// Writes.
    pub writes: Option<u64>,
}

impl IoRates {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// A group that leaves are made in.
#[derive(Debug, Clone)]
pub struct Root {
    path: PathBuf,
    controllers: Vec<String>,
}

/// A group of one VM. Dropping it leaves it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    path: PathBuf,
}

/// What a group has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory in use, bytes.
    pub memory_bytes: u64,
    /// Processor time, microseconds.
    pub cpu_us: u64,
    /// Processes and threads.
    pub pids: u64,
    /// How often a process was killed because memory ran out.
    pub oom_kills: u64,
}

/// Where version 2 is mounted, read from the mount table.
pub fn mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounted(&mounts)
}

fn mounted(mountinfo: &str) -> Option<PathBuf> {
    // `36 35 98:0 /root /mount/point options - type source options`: proc(5).
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == "cgroup2")
            .then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}

impl Root {
    /// Makes a group for leaves, if need be, and has it hand on every controller there is. What there is not is no
    /// error here: [`Root::controllers`] tells, and [`Root::leaf`] refuses a limit that nobody would enforce.
    ///
    /// Where the group above is the one that this process was started in, as in a container or a delegated subtree,
    /// its processes move into a leaf of it: a group that hands controllers on must not hold any itself.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let above = path
            .parent()
            .filter(|above| above.join("cgroup.controllers").exists());
        let above = above.ok_or(Error::NotMounted)?;
        if is_below_root(above) && offers_more(above) && is_own(above) {
            vacate(above)?;
        }
        hand_on(above);
        make(path)?;
        hand_on(path);
        let handed = path.join("cgroup.subtree_control");
        let text = fs::read_to_string(&handed).map_err(step("read", &handed))?;
        Ok(Self {
            path: path.to_owned(),
            controllers: text.split_whitespace().map(str::to_owned).collect(),
        })
    }

    /// The controllers that leaves have.
    pub fn controllers(&self) -> &[String] {
        &self.controllers
    }

    /// The path of the group.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the group if nothing is in it; otherwise it stays, which is no error.
    pub fn remove_if_empty(&self) {
        let _ = fs::remove_dir(&self.path);
    }

    /// Makes a leaf with limits.
    pub fn leaf(&self, name: &str, limits: &Limits) -> Result<Leaf, Error> {
        let leaf = Leaf {
            path: self.path.join(name),
        };
        make(&leaf.path)?;
        match self.limit(&leaf, limits) {
            Ok(()) => Ok(leaf),
            Err(e) => {
                // Half-limited is unlimited.
                let _ = fs::remove_dir(&leaf.path);
                Err(e)
            }
        }
    }

    /// Sets the limits of a leaf that has none, or others.
    pub fn limit(&self, leaf: &Leaf, limits: &Limits) -> Result<(), Error> {
        for (controller, file, value) in settings(limits) {
            if self.controllers.iter().any(|known| known == controller) {
                leaf.write(file, &value)?;
            } else if value != "max" && !value.starts_with("max ") {
                return Err(Error::Controller {
                    path: self.path.clone(),
                    controller: controller.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The leaves there are whose names begin so.
    pub fn leaves(&self, prefix: &str) -> Result<Vec<Leaf>, Error> {
        let entries = fs::read_dir(&self.path).map_err(step("list", &self.path))?;
        let dirs = entries
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        let named = dirs.filter(|e| e.file_name().to_string_lossy().starts_with(prefix));
        Ok(named.map(|e| Leaf { path: e.path() }).collect())
    }
}

/// What is written where: controller, file, value.
fn settings(limits: &Limits) -> Vec<(&'static str, &'static str, String)> {
    let number = |limit: Option<u64>| limit.map_or_else(|| "max".to_owned(), |n| n.to_string());
    let cpu = match limits.cpu_milli {
        Some(milli) => format!("{} {CPU_PERIOD_US}", milli * CPU_PERIOD_US / 1000),
        None => format!("max {CPU_PERIOD_US}"),
    };
    let mut settings = vec![
        ("memory", "memory.max", number(limits.memory_bytes)),
        ("cpu", "cpu.max", cpu),
        ("pids", "pids.max", number(limits.pids)),
    ];
    if limits.memory_bytes.is_some() {
        settings.push(("memory", "memory.swap.max", "0".to_owned()));
    }
    if !limits.io.is_unlimited() {
        let disks = limits.disks.iter();
        settings.extend(disks.map(|disk| ("io", "io.max", io_max(*disk, limits.io))));
    }
    settings
}

fn io_max(disk: Device, rates: IoRates) -> String {
    let given = [
        ("rbps", rates.read_bytes),
        ("wbps", rates.write_bytes),
        ("riops", rates.reads),
        ("wiops", rates.writes),
    ];
    let given = given
        .into_iter()
        .filter_map(|(name, rate)| Some(format!(" {name}={}", rate?)));
    format!("{}:{}{}", disk.major, disk.minor, given.collect::<String>())
}

impl Leaf {
    /// A leaf that exists.
    pub fn at(path: PathBuf) -> Option<Self> {
        path.is_dir().then_some(Self { path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens it, for `CLONE_INTO_CGROUP` or to hand on.
    pub fn open(&self) -> Result<OwnedFd, Error> {
        let file = File::open(&self.path).map_err(step("open", &self.path))?;
        Ok(file.into())
    }

    /// Moves a process, with all its threads, into it.
    pub fn add(&self, pid: u32) -> Result<(), Error> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// What it has used. Figures of controllers that it has not are zero.
    pub fn usage(&self) -> Usage {
        let read = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let number = |file: &str| read(file).trim().parse().unwrap_or_default();
        Usage {
            memory_bytes: number("memory.current"),
            cpu_us: field(&read("cpu.stat"), "usage_usec"),
            pids: number("pids.current"),
            oom_kills: field(&read("memory.events"), "oom_kill"),
        }
    }

    /// Kills whatever runs in it, waits until that is gone, and removes it. Having none is no error.
    pub fn remove(&self) -> Result<(), Error> {
        if !self.path.exists() {
            return Ok(());
        }
        // A kernel before 5.14 has no such file; then only an empty group can be removed.
        let _ = self.write("cgroup.kill", "1");
        let started = Instant::now();
        loop {
            match fs::remove_dir(&self.path) {
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {}
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(step("remove", &self.path)(e));
                }
                _ => return Ok(()),
            }
            if started.elapsed() > GONE_WITHIN {
                return Err(Error::Busy {
                    path: self.path.clone(),
                });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<(), Error> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(step("write", &path))
    }
}

fn make(path: &Path) -> Result<(), Error> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(step("make", path)(e)),
        _ => Ok(()),
    }
}

/// One controller at a time: one that is not there must not keep the others away.
///
/// A group with processes of its own hands nothing on. The kernel refuses that for memory and disks, but not for
/// processor time and processes: those would turn the group into a threaded one, whose leaves can hold no process.
fn hand_on(path: &Path) {
    let busy = |text: String| !text.is_empty();
    if is_below_root(path) && fs::read_to_string(path.join("cgroup.procs")).is_ok_and(busy) {
        return;
    }
    for controller in CONTROLLERS {
        let _ = fs::write(
            path.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
}

/// The root of the hierarchy has no type, and may hold processes. That of a group namespace is as any other.
fn is_below_root(group: &Path) -> bool {
    group.join("cgroup.type").exists()
}

/// Whether there are controllers that the group does not hand on yet.
fn offers_more(group: &Path) -> bool {
    let words = |file: &str| {
        let text = fs::read_to_string(group.join(file)).unwrap_or_default();
        text.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let handed = words("cgroup.subtree_control");
    let offered = words("cgroup.controllers");
    CONTROLLERS.iter().any(|wanted| {
        let has = |list: &[String]| list.iter().any(|has| has == wanted);
        has(&offered) && !has(&handed)
    })
}

/// Whether this process is in that very group.
fn is_own(group: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    own_group().is_some_and(|own| id(&own).is_some() && id(&own) == id(group))
}

/// Moves the processes of a group into a leaf of it. They may make more meanwhile, so it is tried until none is left.
fn vacate(group: &Path) -> Result<(), Error> {
    let procs = group.join("cgroup.procs");
    let leaf = Leaf {
        path: group.join(VACATED),
    };
    make(&leaf.path)?;
    for _ in 0..VACATE_ROUNDS {
        let inside = fs::read_to_string(&procs).map_err(step("read", &procs))?;
        if inside.is_empty() {
            return Ok(());
        }
        for pid in inside.lines() {
            // The kernel writes 0 for one that this process cannot see, and reads 0 as the writer.
            if pid == "0" {
                let hidden = io::Error::other("it holds processes of outside this container");
                return Err(step("empty", group)(hidden));
            }
            match leaf.write("cgroup.procs", pid) {
                // It has ended since.
                Err(Error::Step { source, .. }) if source.raw_os_error() == Some(ESRCH) => {}
                other => other?,
            }
        }
    }
    Err(Error::Busy {
        path: group.to_owned(),
    })
}

fn step<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Step {
        step,
        path: path.to_owned(),
        source,
    }
}

/// A figure of a file of `name value` lines.
fn field(text: &str, name: &str) -> u64 {
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or_default()
}
