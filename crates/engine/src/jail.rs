//! What confines QEMU: a root with the program, its libraries, its firmware and nothing else; a user of its own;
//! a filter of system calls. Prepared once and tried with the program itself, then shared by all VMs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_host::process::root::{self, Root};
use forkd_host::process::{self as host, Confinement, Process, Spawn, Stdio, User};
use tokio::sync::OnceCell;

use super::Accel;
use super::persist::DEVICES_MAX;
use crate::{Enforcement, blocking};
use forkd_host::chain;

/// QEMU's own part of the confinement, which it enters when it has started.
pub(super) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Users for VMs that are given none: in a range that systemd and the tools for containers leave alone, and
/// beyond those of slots.
const USERS_FROM: u32 = 0x7100_0000;
const USERS: u32 = 0x00ff_ffff;
/// How long the program may take to say its version in the jail.
const TRIAL_LIMIT: Duration = Duration::from_secs(30);
/// Files a VM may have open.
const OPEN_FILES: u64 = 1024;
/// Threads a VM may have: a few for each vCPU, and QEMU's own pool of 64.
const THREADS: u64 = 256;
const KVM_DEVICE: &str = "/dev/kvm";
/// The firmware of the machine, in the directory of QEMU's data.
const FIRMWARE: [&str; 2] = ["bios-microvm.bin", "qboot.rom"];
/// Debian has the emulator of instructions in a file of its own.
const EMULATOR: &str = "accel-tcg-x86_64.so";

/// The jail of an engine.
#[derive(Debug)]
pub(super) struct Jail {
    wanted: bool,
    walls: OnceCell<Walls>,
}

/// What of the jail this host can enforce.
#[derive(Debug, Clone)]
pub(super) struct Walls {
    /// The program's path, for those who see only the root.
    program: PathBuf,
    root: Option<Root>,
    /// System calls are filtered and limits set, with or without a root.
    filtered: bool,
    /// Why there is no root, or no filter.
    why: String,
}

impl Jail {
    pub(super) fn new(wanted: bool) -> Jail {
        Jail {
            wanted,
            walls: OnceCell::new(),
        }
    }

    /// What VMs are confined with. Prepared at the first call.
    pub(super) async fn walls(&self, program: &Path, accel: Accel) -> &Walls {
        let wanted = self.wanted;
        let prepare = || async {
            let program = program.to_owned();
            blocking::run(move || match wanted {
                true => Walls::prepare(&program, accel),
                false => Walls::none(&program, "it was switched off (--jail off)".to_owned()),
            })
            .await
        };
        self.walls.get_or_init(prepare).await
    }
}

impl Walls {
    fn none(program: &Path, why: String) -> Walls {
        Walls {
            program: program.to_owned(),
            root: None,
            filtered: false,
            why,
        }
    }

    /// The strongest walls that this host has. Blocks.
    fn prepare(program: &Path, accel: Accel) -> Walls {
        let why = match strong(program, accel) {
            Ok(walls) => return walls,
            Err(why) => why,
        };
        tracing::warn!(why, "VMs share this host's files, networks and user");
        let mut walls = Walls::none(program, why);
        walls.filtered = true;
        if let Err(error) = walls.try_out() {
            tracing::warn!(error, "system calls of VMs are not filtered");
            walls.filtered = false;
            walls.why = format!("{}; {error}", walls.why);
        }
        walls
    }

    /// The program to start.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// Whether VMs run as other users than this process, and see none of its files.
    pub(super) fn strong(&self) -> bool {
        self.root.is_some()
    }

    /// Whether anything confines VMs.
    pub(super) fn filtered(&self) -> bool {
        self.filtered
    }

    /// The user that a VM runs as: the one of its slot, or else one made from its name. `None`: this user.
    pub(super) fn user(&self, id: &str, given: Option<u32>) -> Option<User> {
        self.strong().then(|| User {
            id: given.unwrap_or_else(|| user_of(id)),
            groups: Vec::new(),
        })
    }

    /// How a VM is confined. `None`: not at all.
    pub(super) fn confinement(&self, user: Option<User>) -> Option<Confinement> {
        self.filtered.then(|| Confinement {
            root: self.root.clone(),
            user,
            file_bytes: DEVICES_MAX,
            open_files: OPEN_FILES,
            threads: THREADS,
        })
    }

    /// Runs the program in them: whatever is amiss here would be amiss with every VM.
    fn try_out(&self) -> Result<(), String> {
        let (stderr, writer) = io::pipe().map_err(|error| error.to_string())?;
        let process = Process::spawn(Spawn {
            stderr: Stdio::Fd(writer.into()),
            die_with_parent: true,
            confine: self.confinement(self.user("trial", None)),
            ..Spawn::new(&self.program, vec!["--version".into()])
        });
        let process = process.map_err(|error| chain(&error))?;
        let ended = process
            .wait_for(TRIAL_LIMIT)
            .map_err(|error| chain(&error))?;
        match ended {
            Some(host::Exit::Code(0)) => Ok(()),
            Some(exit) => {
                let said = io::read_to_string(stderr).unwrap_or_default();
                Err(format!("QEMU ends with {exit} in a jail: {}", said.trim()))
            }
            None => {
                let _ = process.kill();
                let _ = process.wait_for(TRIAL_LIMIT);
                Err("QEMU does not answer in a jail".to_owned())
            }
        }
    }

    /// Each layer, and whether it holds.
    pub(super) fn enforcement(&self) -> Vec<(&'static str, Enforcement)> {
        let is = |enforced: bool| match enforced {
            true => Enforcement::Enforced,
            false => Enforcement::NotEnforced {
                why: self.why.clone(),
            },
        };
        vec![
            ("user", is(self.strong())),
            ("root", is(self.strong())),
            ("namespaces", is(self.strong())),
            ("template", is(self.strong())),
            ("seccomp", is(self.filtered)),
            ("rlimits", is(self.filtered)),
        ]
    }
}

fn strong(program: &Path, accel: Accel) -> Result<Walls, String> {
    let program = find(program).map_err(|e| format!("cannot find {}: {e}", program.display()))?;
    let files = files(&program).map_err(|error| chain(&error))?;
    let devices = match accel {
        Accel::Kvm => vec![PathBuf::from(KVM_DEVICE)],
        Accel::Tcg => Vec::new(),
    };
    let root = Root::make(&files, &devices).map_err(|error| chain(&error))?;
    let walls = Walls {
        program,
        root: Some(root),
        filtered: true,
        why: String::new(),
    };
    walls.try_out().map(|()| walls)
}

/// The same name is the same user again, and no other VM of this node has it, unless by a chance of one in
/// millions.
fn user_of(id: &str) -> u32 {
    let hash = blake3::hash(id.as_bytes());
    let [a, b, c, d, ..] = *hash.as_bytes();
    USERS_FROM + (u32::from_le_bytes([a, b, c, d]) & USERS)
}

/// The program's file: as it is named, or where `PATH` has it.
fn find(program: &Path) -> io::Result<PathBuf> {
    if program.components().count() > 1 {
        return fs::canonicalize(program);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(program));
    let found = found.find(|path| path.is_file());
    fs::canonicalize(found.ok_or(io::ErrorKind::NotFound)?)
}

/// What QEMU reads of a host.
fn files(program: &Path) -> Result<Vec<PathBuf>, root::Error> {
    let mut files = root::with_libraries(program)?;
    let prefix = program.parent().and_then(Path::parent);
    let prefix = prefix.unwrap_or_else(|| Path::new("/usr"));
    if let Some(emulator) = emulator(prefix) {
        // Its libraries are the program's.
        files.push(emulator);
    }
    for name in FIRMWARE {
        files.push(prefix.join("share/qemu").join(name));
        files.push(Path::new("/usr/share/qemu").join(name));
    }
    // Where the loader looks first.
    files.push("/etc/ld.so.cache".into());
    files.retain(|file| file.is_file());
    Ok(files)
}

fn emulator(prefix: &Path) -> Option<PathBuf> {
    let libraries = [prefix.join("lib"), prefix.join("lib64")];
    let below = fs::read_dir(&libraries[0]).into_iter().flatten().flatten();
    let below = below.map(|entry| entry.path());
    let mut found = libraries
        .iter()
        .cloned()
        .chain(below)
        .map(|dir| dir.join("qemu").join(EMULATOR));
    found.find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_differ_and_stay_in_their_range() {
        let users: std::collections::BTreeSet<u32> =
            (0..1000).map(|n| user_of(&format!("sb-{n}"))).collect();
        assert!(users.len() > 990 && users.iter().all(|user| *user >= USERS_FROM));
        assert_eq!(user_of("sb-1"), user_of("sb-1"));
    }

    #[test]
    fn a_jail_that_was_switched_off_says_so() {
        let walls = Walls::none(Path::new("qemu"), "off".to_owned());
        assert!(walls.confinement(walls.user("a", Some(7))).is_none());
        let why = "off".to_owned();
        let none = Enforcement::NotEnforced { why };
        assert!(walls.enforcement().iter().all(|(_, is)| *is == none));
    }

    #[test]
    fn a_program_that_fails_in_the_jail_is_no_jail() {
        let walls = Walls::prepare(Path::new("false"), Accel::Tcg);
        assert!(!walls.strong() && !walls.filtered() && !walls.why.is_empty());
    }
}
