//! Gathers what the checks judge. Reads only; the one exception is a file made and removed again to learn
//! whether a directory can be written to.

use std::path::{Path, PathBuf};

use forkd_daemon::{EngineName, NodePaths};
use forkd_engine::firecracker;
use forkd_host::facts::{Facts, Tool, find_tool};
use forkd_slot::host::V6;

/// Everything that is judged.
#[derive(Debug, Clone)]
pub(crate) struct Findings {
    /// The engine that was asked for.
    pub engine: EngineName,
    /// The machine.
    pub facts: Facts,
    /// `x86_64` and the like.
    pub arch: &'static str,
    /// QEMU.
    pub qemu: Option<Tool>,
    /// Firecracker.
    pub firecracker: Option<Tool>,
    /// The built-in monitor's program.
    pub vmm: Option<PathBuf>,
    /// What builds images, by program: present or not.
    pub image_tools: Vec<(&'static str, &'static str, bool)>,
    /// Whether the image a first run needs is there already.
    pub image_built: bool,
    /// Kernel images on this host that guests may boot.
    pub kernels: Vec<PathBuf>,
    /// The guest agent, or why there is none.
    pub agent: Result<PathBuf, String>,
    /// The firewall's program.
    pub nft: bool,
    /// Whether guests have IPv6.
    pub v6: V6,
    /// The data directory.
    pub data: Place,
    /// The directory of running VMs.
    pub run: Place,
    /// What runs of a killed process left, by name.
    pub left_behind: Vec<String>,
    /// The daemon.
    pub daemon: Daemon,
}

/// A directory that must be written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where.
    pub path: PathBuf,
    /// Why it cannot be written to.
    pub problem: Option<String>,
    /// Bytes free.
    pub free_bytes: Option<u64>,
}

/// Whether a daemon answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Daemon {
    /// Nobody asked.
    NotAsked,
    /// None answers.
    Absent,
    /// One answers.
    Answers {
        /// Its version.
        version: String,
        /// Its engine.
        engine: String,
    },
    /// One answers, but not as it should.
    Refuses(String),
}

impl Findings {
    /// Looks at this host. Takes some ten milliseconds, most of it QEMU saying its version.
    pub(crate) fn gather(engine: EngineName, paths: &NodePaths, image: &str) -> Self {
        let tools = [
            ("mmdebstrap", "mmdebstrap"),
            ("mkfs.erofs", "erofs-utils"),
            ("dpkg-deb", "dpkg"),
            ("apt-get", "apt"),
        ];
        Self {
            engine,
            facts: Facts::collect(),
            arch: std::env::consts::ARCH,
            qemu: find_tool("qemu-system-x86_64", "--version"),
            firecracker: find_tool(firecracker::PROGRAM, "--version"),
            vmm: forkd_engine::kvm::find_program().ok(),
            image_tools: tools
                .map(|(program, pkg)| (program, pkg, on_path(program)))
                .to_vec(),
            image_built: image_built(&paths.images, image),
            kernels: kernels(Path::new("/boot")),
            agent: crate::agent::find().map_err(|failure| failure.message().to_owned()),
            nft: on_path("nft"),
            v6: V6::look(),
            data: place(&paths.data),
            run: place(&paths.run),
            left_behind: left_behind(&paths.run),
            daemon: Daemon::NotAsked,
        }
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| is_program(&dir.join(program)))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Whether a usable image of this name is there. The store is not opened: that would make it.
fn image_built(images: &Path, name: &str) -> bool {
    images.join("images").is_dir()
        && forkd_image::Store::open(images)
            .and_then(|store| store.get(name))
            .is_ok_and(|image| image.is_some())
}

fn kernels(boot: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(boot) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("vmlinuz-") && name.contains("cloud")
        })
        .collect();
    found.sort();
    found
}

/// Whether the nearest existing directory can be written to: what is missing would be made there.
fn place(path: &Path) -> Place {
    let existing = path
        .ancestors()
        .find(|dir| dir.is_dir())
        .unwrap_or_else(|| Path::new("/"));
    let probe = existing.join(format!(".forkd-doctor-{}", std::process::id()));
    let problem = match std::fs::File::create_new(&probe) {
        Ok(_) => std::fs::remove_file(&probe).err(),
        Err(error) => Some(error),
    };
    Place {
        path: path.to_owned(),
        problem: problem.map(|error| error.to_string()),
        free_bytes: forkd_host::file::free_bytes(existing).ok(),
    }
}

/// Directories of VMs whose process is gone.
fn left_behind(run: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(run) else {
        return Vec::new();
    };
    let programs = ["qemu-system-x86_64", "forkd-vmm", "firecracker"];
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .filter(|path| forkd_host::orphans::users(path, &programs).is_empty())
        .filter_map(|path| {
            path.file_name()
                .map(|name| name.to_string_lossy().into_owned())
        })
        .collect()
}
