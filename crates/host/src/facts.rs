//! What this machine is and has, as plain values: read-only probes, for checks before work begins.
//! Nothing here judges; who asks knows what is needed.
//!
//! Whatever cannot be read is absent from the values. Reading is kept apart from parsing, so that the
//! parsers are tested on texts of machines that are not at hand.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

mod parse;
mod tool;

pub use tool::{Tool, find_tool};

/// What [`Facts::collect`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The processors.
    pub cpu: Cpu,
    /// The kernel's release, such as `6.1.0-18-amd64`.
    pub kernel: String,
    /// The distribution's name, such as `Debian GNU/Linux 12 (bookworm)`.
    pub distribution: Option<String>,
    /// RAM.
    pub memory: Memory,
    /// Control groups.
    pub cgroup: Cgroup,
    /// `/dev/kvm`.
    pub kvm: Device,
    /// `/dev/net/tun`.
    pub tun: Device,
    /// `/dev/vhost-vsock`.
    pub vhost_vsock: Device,
    /// `/dev/vhost-net`.
    pub vhost_net: Device,
    /// The effective user id.
    pub uid: u32,
    /// How many user namespaces a user may make; 0 is none.
    pub user_namespaces_max: Option<u64>,
    /// How many files this process may have open, now and at most. `None` is no limit.
    pub open_files: (Option<u64>, Option<u64>),
}

/// The processors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    /// The model's name.
    pub model: String,
    /// How many there are.
    pub count: u32,
    /// What they have for running virtual machines.
    pub virtualization: Option<Virtualization>,
    /// Whether this machine is itself a virtual one.
    pub is_guest: bool,
}

/// Virtualisation in hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Virtualization {
    /// Intel's, the flag `vmx`.
    Vmx,
    /// AMD's, the flag `svm`.
    Svm,
}

/// RAM, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All there is.
    pub total_bytes: u64,
    /// What can be used without swapping.
    pub available_bytes: u64,
}

/// Control groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cgroup {
    /// Where version 2 is mounted.
    pub v2: Option<PathBuf>,
    /// The controllers that version 2 has there.
    pub controllers: Vec<String>,
    /// Controllers that version 1 holds, and that version 2 therefore lacks.
    pub v1_controllers: Vec<String>,
}

/// Whether a device can be opened for reading and writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// It can.
    Usable,
    /// There is none.
    Absent,
    /// This user may not.
    Denied,
    /// It cannot, for this reason.
    Broken(String),
}

impl Device {
    /// Opens the device and closes it again.
    pub fn probe(path: &Path) -> Device {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(_) => Device::Usable,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => Device::Absent,
                io::ErrorKind::PermissionDenied => Device::Denied,
                _ => Device::Broken(error.to_string()),
            },
        }
    }

    /// Whether it can be opened.
    pub fn is_usable(&self) -> bool {
        *self == Device::Usable
    }
}

impl Facts {
    /// Looks at this machine. Takes about a millisecond.
    pub fn collect() -> Facts {
        let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        Facts {
            cpu: parse::cpu(&text("/proc/cpuinfo")),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            distribution: parse::distribution(&text("/etc/os-release")),
            memory: memory(),
            cgroup: cgroup(),
            kvm: Device::probe(Path::new("/dev/kvm")),
            tun: Device::probe(Path::new("/dev/net/tun")),
            vhost_vsock: Device::probe(Path::new("/dev/vhost-vsock")),
            vhost_net: Device::probe(Path::new("/dev/vhost-net")),
            uid: rustix::process::geteuid().as_raw(),
            user_namespaces_max: parse::number(&text("/proc/sys/user/max_user_namespaces")),
            open_files: (limits.current, limits.maximum),
        }
    }
}

/// RAM, now.
pub fn memory() -> Memory {
    parse::memory(&text("/proc/meminfo"))
}

fn cgroup() -> Cgroup {
    let (v2, v1_controllers) = parse::cgroup_mounts(&text("/proc/self/mountinfo"));
    let controllers = match &v2 {
        Some(mount) => text(mount.join("cgroup.controllers")),
        None => String::new(),
    };
    Cgroup {
        v2,
        controllers: parse::words(&controllers),
        v1_controllers,
    }
}

/// A small text of the kernel's; empty where there is none.
fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests;
