//! Who uses which number: one small file for each slot, shared by every node of this host.
//!
//! Several nodes may run on one host, a daemon and a command beside it. Names of namespaces and devices are the host's,
//! so a number must belong to one node only, and only its owner may clean it up, also after a crash. The files lie
//! where a reboot clears them, as it clears the namespaces.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::address::MAX_SLOTS;

/// Where the files are.
pub const DIRECTORY: &str = "/run/forkd-slots";

/// The registry cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {}", .path.display())]
pub struct Error {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The numbers, as one node sees them.
#[derive(Debug, Clone)]
pub struct Registry {
    directory: PathBuf,
    owner: String,
}

impl Registry {
    /// Opens the registry for a node; `owner` names it, the same after a restart and unlike any other on this host.
    pub fn open(directory: &Path, owner: &str) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(failed("make", directory))?;
        Ok(Self {
            directory: directory.to_owned(),
            owner: owner.to_owned(),
        })
    }

    /// Takes a number; `false` when another node has it.
    pub fn claim(&self, index: u32) -> Result<bool, Error> {
        let path = self.path(index);
        let partial = self
            .directory
            .join(format!("{index}.{}", std::process::id()));
        let written =
            File::create(&partial).and_then(|mut file| file.write_all(self.owner.as_bytes()));
        // Linked when it is whole: a file without an owner in it would belong to nobody for ever.
        let linked = written.and_then(|()| fs::hard_link(&partial, &path));
        let _ = fs::remove_file(&partial);
        match linked {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let owner = fs::read_to_string(&path).unwrap_or_default();
                Ok(owner == self.owner)
            }
            Err(e) => Err(failed("write", &path)(e)),
        }
    }

    /// Gives a number back.
    pub fn release(&self, index: u32) -> Result<(), Error> {
        let path = self.path(index);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// The numbers that are ours.
    pub fn ours(&self) -> Result<Vec<u32>, Error> {
        let entries = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        let numbers =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let mut ours: Vec<u32> = numbers
            .filter(|index| *index < MAX_SLOTS)
            .filter(|index| {
                fs::read_to_string(self.path(*index)).is_ok_and(|owner| owner == self.owner)
            })
            .collect();
        ours.sort_unstable();
        Ok(ours)
    }

    fn path(&self, index: u32) -> PathBuf {
        self.directory.join(index.to_string())
    }
}

fn failed<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error {
        step,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_one_owner_who_finds_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let open = |owner| Registry::open(dir.path(), owner).unwrap();
        let (ours, theirs) = (open("/var/lib/one"), open("/var/lib/two"));
        assert!(ours.claim(3).unwrap());
        assert!(!theirs.claim(3).unwrap());
        assert!(theirs.claim(4).unwrap());
        // After a crash.
        assert!(open("/var/lib/one").claim(3).unwrap());
        assert_eq!(ours.ours().unwrap(), [3]);
        ours.release(3).unwrap();
        ours.release(3).unwrap();
        assert!(theirs.claim(3).unwrap());
        assert_eq!(
            (ours.ours().unwrap(), theirs.ours().unwrap()),
            (vec![], vec![3, 4])
        );
    }
}
