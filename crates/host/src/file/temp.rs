//! Temporary names: whose owner lives, and what to do when he does not.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use super::lock::{is_same, lock_path, try_lock};
use super::{Error, failed, remove_all, rename_new};

/// Tries at a free name before giving up; more than one is only needed against leftovers and sweepers.
const NAME_TRIES: u32 = 100;

/// A directory that is removed with this value, and that [`sweep`] removes should this process die.
///
/// Its owner holds a lock on the directory itself. So "abandoned" is a fact the kernel knows, true
/// across pid reuse, containers and reboots. The process id in the name is for people.
#[derive(Debug)]
pub struct TempDir {
    path: Option<PathBuf>,
    // Held for the lock; closing it is what makes the directory an orphan.
    _lock: File,
}

impl TempDir {
    /// Creates `.stem-pid-number` in `parent`, which must exist.
    pub fn create(parent: &Path, stem: &str) -> Result<TempDir, Error> {
        for _ in 0..NAME_TRIES {
            let path = parent.join(unique_name(stem));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed("create directory", &path)(error)),
            }
            // A sweeper may have come between creation and lock; then the name is lost to it.
            if let Some(lock) = lock_path(&path)? {
                return Ok(TempDir {
                    path: Some(path),
                    _lock: lock,
                });
            }
        }
        Err(no_free_name(parent))
    }

    /// Creates `.stem-name` in `parent`, of which there can be only one: [`Error::Locked`] while
    /// somebody has it, here or in another process. What a dead owner left is removed first.
    pub fn claim(parent: &Path, stem: &str, name: &str) -> Result<TempDir, Error> {
        let path = parent.join(format!(".{stem}-{name}"));
        for _ in 0..NAME_TRIES {
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    if let Some(lock) = lock_path(&path)? {
                        return Ok(TempDir {
                            path: Some(path),
                            _lock: lock,
                        });
                    }
                }
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("create directory", &path)(error));
                }
                Err(_) => match lock_path(&path)? {
                    Some(_orphan) => remove_all(&path)?,
                    None if path.exists() => break,
                    None => {}
                },
            }
        }
        Err(Error::Locked { path, holder: None })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        // Only the consuming methods take the path.
        self.path.as_deref().unwrap_or_else(|| Path::new(""))
    }

    /// Gives it its final name, which must be free, durably. On failure it is removed.
    pub fn publish(mut self, to: &Path) -> Result<(), Error> {
        rename_new(self.path(), to)?;
        self.path = None;
        Ok(())
    }

    /// Removes it and says so if that failed.
    pub fn remove(mut self) -> Result<(), Error> {
        let path = self.path.take();
        path.map_or(Ok(()), |path| remove_all(&path))
    }
}

#[cfg(test)]
impl TempDir {
    /// Leaves what a killed process leaves: the directory stays, the lock is gone.
    pub(super) fn abandon(mut self) -> PathBuf {
        self.path.take().unwrap_or_default()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let Some(path) = self.path.take() else { return };
        if let Err(error) = remove_all(&path) {
            tracing::warn!(%error, path = %path.display(), "temporary directory left behind");
        }
    }
}

/// Removes the leftovers of dead processes named `.stem-…` in a directory: directories made by
/// [`TempDir`], and temporary files of [`publish`]. Answers what it removed.
pub fn sweep(parent: &Path, stem: &str) -> Result<Vec<PathBuf>, Error> {
    let prefix = format!(".{stem}-");
    let mut removed = Vec::new();
    for entry in fs::read_dir(parent).map_err(failed("list", parent))? {
        let entry = entry.map_err(failed("list", parent))?;
        if !entry.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        let path = entry.path();
        // Held until the removal is done, so that two sweepers do not meet.
        if let Some(_lock) = lock_path(&path)? {
            remove_all(&path)?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// Creates an empty file, locked against [`sweep`] until it is closed.
pub(super) fn unique_file(parent: &Path, stem: &str) -> Result<(PathBuf, File), Error> {
    for _ in 0..NAME_TRIES {
        let path = parent.join(unique_name(stem));
        let mut options = OpenOptions::new();
        match options.write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) if try_lock(&file, &path)? && is_same(&file, &path) => {
                return Ok((path, file));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("create", &path)(error)),
        }
    }
    Err(no_free_name(parent))
}

fn no_free_name(parent: &Path) -> Error {
    let taken = io::Error::from(io::ErrorKind::AlreadyExists);
    failed("find a free temporary name in", parent)(taken)
}

/// A name nobody else uses: `.stem-pid-number`.
fn unique_name(stem: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".{stem}-{}-{number}", process::id())
}
