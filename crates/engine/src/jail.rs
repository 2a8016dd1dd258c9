//! What confines monitors that are other projects': a root with the program, what it needs and nothing else; a user
//! of its own; a filter of system calls. Prepared once and tried with the program itself, then shared by all VMs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forkd_host::process::root::{self, Contents, Root};
use forkd_host::process::{self as host, Confinement, Process, Spawn, Stdio, User};
use tokio::sync::OnceCell;

use crate::{Enforcement, blocking};
use forkd_host::chain;

/// Users for VMs that are given none: in a range that systemd and the tools for containers leave alone, and
/// beyond those of slots.
const USERS_FROM: u32 = 0x7100_0000;
const USERS: u32 = 0x00ff_ffff;
/// How long the program may take to say its version in the jail.
const TRIAL_LIMIT: Duration = Duration::from_secs(30);

/// What monitors of a kind need in a jail.
#[derive(Debug)]
pub(crate) struct Kind {
    /// The monitor's name, as its users write it.
    pub(crate) title: &'static str,
    /// It makes sockets of its own, of the UNIX family.
    pub(crate) own_sockets: bool,
    /// Files it may have open.
    pub(crate) open_files: u64,
    /// Threads it may have.
    pub(crate) threads: u64,
}

/// The jail of an engine.
#[derive(Debug)]
pub(crate) struct Jail {
    wanted: bool,
    walls: OnceCell<Walls>,
}

/// What of the jail this host can enforce.
#[derive(Debug, Clone)]
pub(crate) struct Walls {
    kind: &'static Kind,
    /// The program's path, for those who see only the root.
    program: PathBuf,
    root: Option<Root>,
    /// System calls are filtered and limits set, with or without a root.
    filtered: bool,
    /// Why there is no root, or no filter.
    why: String,
}

impl Jail {
    pub(crate) fn new(wanted: bool) -> Jail {
        Jail {
            wanted,
            walls: OnceCell::new(),
        }
    }

    /// What VMs are confined with. Prepared at the first call; then `contents` says, of the program's file, its name
    /// in the root and what else is there.
    pub(crate) async fn walls<C>(&self, program: &Path, kind: &'static Kind, contents: C) -> &Walls
    where
        C: FnOnce(&Path) -> Result<(PathBuf, Contents), root::Error> + Send + 'static,
    {
        let wanted = self.wanted;
        let prepare = || async {
            let program = program.to_owned();
            let off = "it was switched off (--jail off)";
            blocking::run(move || match wanted {
                true => Walls::prepare(&program, kind, contents),
                false => Walls::none(&program, kind, off.to_owned()),
            })
            .await
        };
        self.walls.get_or_init(prepare).await
    }
}

impl Walls {
    fn none(program: &Path, kind: &'static Kind, why: String) -> Walls {
        Walls {
            kind,
            program: program.to_owned(),
            root: None,
            filtered: false,
            why,
        }
    }

    /// The strongest walls that this host has. Blocks.
    fn prepare<C>(program: &Path, kind: &'static Kind, contents: C) -> Walls
    where
        C: FnOnce(&Path) -> Result<(PathBuf, Contents), root::Error>,
    {
        let why = match strong(program, kind, contents) {
            Ok(walls) => return walls,
            Err(why) => why,
        };
        tracing::warn!(why, "VMs share this host's files, networks and user");
        // Confined programs have no environment, and so no PATH.
        let found = find(program).unwrap_or_else(|_| program.to_owned());
        let mut walls = Walls::none(&found, kind, why);
        walls.filtered = true;
        if let Err(error) = walls.try_out() {
            tracing::warn!(error, "system calls of VMs are not filtered");
            walls.filtered = false;
            walls.why = format!("{}; {error}", walls.why);
        }
        walls
    }

    /// The root that all of them share; `None`: they see the host's.
    pub(crate) fn root(&self) -> Option<&Root> {
        self.root.as_ref()
    }

    /// The program to start.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Whether VMs run as other users than this process, and see none of its files.
    pub(crate) fn strong(&self) -> bool {
        self.root.is_some()
    }

    /// Whether anything confines VMs.
    pub(crate) fn filtered(&self) -> bool {
        self.filtered
    }

    /// The user that a VM runs as: the one of its slot, or else one made from its name. `None`: this user.
    pub(crate) fn user(&self, id: &str, given: Option<u32>) -> Option<User> {
        self.strong().then(|| User {
            id: given.unwrap_or_else(|| user_of(id)),
            groups: Vec::new(),
        })
    }

    /// How a VM is confined. `None`: not at all.
    /// `file_bytes` is the most that a file it writes may have.
    pub(crate) fn confinement(&self, user: Option<User>, file_bytes: u64) -> Option<Confinement> {
        self.filtered.then(|| Confinement {
            root: self.root.clone(),
            given_network: false,
            own_sockets: self.kind.own_sockets,
            user,
            file_bytes,
            open_files: self.kind.open_files,
            threads: self.kind.threads,
        })
    }

    /// Runs the program in them: whatever is amiss here would be amiss with every VM.
    fn try_out(&self) -> Result<(), String> {
        let (stderr, writer) = io::pipe().map_err(|error| error.to_string())?;
        let process = Process::spawn(Spawn {
            stderr: Stdio::Fd(writer.into()),
            die_with_parent: true,
            confine: self.confinement(self.user("trial", None), 0),
            ..Spawn::new(&self.program, vec!["--version".into()])
        });
        let process = process.map_err(|error| chain(&error))?;
        let title = self.kind.title;
        let ended = process
            .wait_for(TRIAL_LIMIT)
            .map_err(|error| chain(&error))?;
        match ended {
            Some(host::Exit::Code(0)) => Ok(()),
            Some(exit) => {
                let said = io::read_to_string(stderr).unwrap_or_default();
                Err(format!(
                    "{title} ends with {exit} in a jail: {}",
                    said.trim()
                ))
            }
            None => {
                let _ = process.kill();
                let _ = process.wait_for(TRIAL_LIMIT);
                Err(format!("{title} does not answer in a jail"))
            }
        }
    }

    /// Each layer, and whether it holds.
    pub(crate) fn enforcement(&self) -> Vec<(&'static str, Enforcement)> {
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

fn strong<C>(program: &Path, kind: &'static Kind, contents: C) -> Result<Walls, String>
where
    C: FnOnce(&Path) -> Result<(PathBuf, Contents), root::Error>,
{
    let found = find(program).map_err(|e| format!("cannot find {}: {e}", program.display()))?;
    let (program, contents) = contents(&found).map_err(|error| chain(&error))?;
    let root = Root::make(&contents).map_err(|error| chain(&error))?;
    let walls = Walls {
        kind,
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

/// A program's file: as it is named, or where `PATH` has it.
fn find(program: &Path) -> io::Result<PathBuf> {
    if program.components().count() > 1 {
        return fs::canonicalize(program);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(program));
    let found = found.find(|path| path.is_file());
    fs::canonicalize(found.ok_or(io::ErrorKind::NotFound)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind {
        title: "false",
        own_sockets: false,
        open_files: 16,
        threads: 16,
    };

    #[test]
    fn users_differ_and_stay_in_their_range() {
        let users: std::collections::BTreeSet<u32> =
            (0..1000).map(|n| user_of(&format!("sb-{n}"))).collect();
        assert!(users.len() > 990 && users.iter().all(|user| *user >= USERS_FROM));
        assert_eq!(user_of("sb-1"), user_of("sb-1"));
    }

    #[test]
    fn a_jail_that_was_switched_off_says_so() {
        let walls = Walls::none(Path::new("qemu"), &KIND, "off".to_owned());
        assert!(walls.confinement(walls.user("a", Some(7)), 0).is_none());
        let why = "off".to_owned();
        let none = Enforcement::NotEnforced { why };
        assert!(walls.enforcement().iter().all(|(_, is)| *is == none));
    }

    #[test]
    fn a_program_that_fails_in_the_jail_is_no_jail() {
        let walls = Walls::prepare(Path::new("false"), &KIND, |program| {
            let files = root::with_libraries(program)?;
            let contents = Contents {
                files,
                ..Contents::default()
            };
            Ok((program.to_owned(), contents))
        });
        assert!(!walls.strong() && !walls.filtered() && !walls.why.is_empty());
        // Without an environment it is not looked for.
        assert!(walls.program().is_absolute());
    }
}
