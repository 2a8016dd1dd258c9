//! Files that must be whole or absent: atomic publishing, temporary directories that another process
//! can tell from abandoned ones, lock files that name their holder, and checks of free space.
//!
//! Everything durable follows one order: write beside, fsync, rename, fsync the directory. A crash
//! between any two steps leaves the old state plus garbage with a dot name, which [`sweep`] removes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

mod lock;
mod temp;

pub use lock::{DirLock, LockFile, is_claimed};
pub use temp::{TempDir, sweep};

/// What failed, and on which path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One step on one path failed.
    #[error("cannot {step} {path}")]
    Io {
        /// The step, such as `create` or `sync`.
        step: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The name that was to be given is taken.
    #[error("{path} exists already")]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// Another process, or another part of this one, holds the lock.
    #[error("{path} is locked by {}; stop it or wait for it", holder_name(*.holder))]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// The holder's process id, where it could be read.
        holder: Option<u32>,
    },
    /// The file system has too little space.
    #[error(
        "{path} has {} MiB free, {} MiB are needed; free some space or choose another directory",
        .free / MIB, .needed.div_ceil(MIB)
    )]
    Space {
        /// A path on the file system.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
}

const MIB: u64 = 1024 * 1024;

fn holder_name(holder: Option<u32>) -> String {
    match holder {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { step, path, source }
}

/// Writes a whole file so that readers see the old contents or the new, never a part, and a crash
/// afterwards does not undo it.
pub fn publish(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (beside, mut file) = temp::unique_file(parent_of(path), &format!("{name}.tmp"))?;
    let result = file
        .write_all(contents)
        .map_err(failed("write", &beside))
        .and_then(|()| file.sync_all().map_err(failed("sync", &beside)))
        .and_then(|()| fs::rename(&beside, path).map_err(failed("rename into place", path)))
        .and_then(|()| sync_parent(path));
    if result.is_err() {
        // Nothing to report: it may have its final name already, and a sweep finds it otherwise.
        let _ = fs::remove_file(&beside);
    }
    result
}

/// Creates a new file, writes it and syncs it. The caller syncs the directory.
pub fn write_synced(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(0o600).open(path);
    let mut file = opened.map_err(failed("create", path))?;
    file.write_all(contents).map_err(failed("write", path))?;
    file.sync_all().map_err(failed("sync", path))
}

/// Makes what was written to a file survive a power cut.
pub fn sync_file(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(failed("open", path))?;
    file.sync_all().map_err(failed("sync", path))
}

/// Makes names in a directory survive a power cut.
pub fn sync_dir(path: &Path) -> Result<(), Error> {
    sync_file(path)
}

/// Syncs the directory that holds a path.
pub fn sync_parent(path: &Path) -> Result<(), Error> {
    sync_dir(parent_of(path))
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Moves a file or directory to a name that must be free, and makes the move durable.
pub fn rename_new(from: &Path, to: &Path) -> Result<(), Error> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => sync_parent(to),
        Err(Errno::EXIST) => Err(Error::Exists {
            path: to.to_owned(),
        }),
        // A file system without the flag: the check and the move are two steps there.
        Err(Errno::INVAL | Errno::NOSYS) if to.symlink_metadata().is_ok() => Err(Error::Exists {
            path: to.to_owned(),
        }),
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(from, to)
            .map_err(failed("rename into place", to))
            .and_then(|()| sync_parent(to)),
        Err(errno) => Err(failed("rename into place", to)(errno.into())),
    }
}

/// Creates a directory and its parents, readable by its owner only; one that exists is left as it is.
pub fn create_dir(path: &Path) -> Result<(), Error> {
    let mut builder = DirBuilder::new();
    let created = builder.recursive(true).mode(0o700).create(path);
    created.map_err(failed("create directory", path))
}

/// Reads a file that must not be longer than `max` bytes.
pub fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, Error> {
    let file = File::open(path).map_err(failed("open", path))?;
    let mut bytes = Vec::new();
    let mut bounded = file.take(max.saturating_add(1));
    bounded
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    if bytes.len() as u64 > max {
        let long = io::Error::new(
            io::ErrorKind::InvalidData,
            format!("longer than {max} bytes"),
        );
        return Err(failed("read", path)(long));
    }
    Ok(bytes)
}

/// Removes a file or a directory tree; what is gone already is fine.
pub fn remove_all(path: &Path) -> Result<(), Error> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// How full a file system is, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What this process may still write.
    pub free: u64,
    /// All there is.
    pub total: u64,
}

/// How full the file system is that holds `path`.
pub fn space(path: &Path) -> Result<Space, Error> {
    let stat = rustix::fs::statvfs(path);
    let stat = stat.map_err(|errno| failed("ask the free space of", path)(errno.into()))?;
    Ok(Space {
        free: stat.f_bavail.saturating_mul(stat.f_frsize),
        total: stat.f_blocks.saturating_mul(stat.f_frsize),
    })
}

/// Bytes that this process may still write to the file system that holds `path`.
pub fn free_bytes(path: &Path) -> Result<u64, Error> {
    Ok(space(path)?.free)
}

/// Refuses where fewer than `needed` bytes are free.
pub fn require_free(path: &Path, needed: u64) -> Result<(), Error> {
    let free = free_bytes(path)?;
    if free < needed {
        return Err(Error::Space {
            path: path.to_owned(),
            needed,
            free,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
