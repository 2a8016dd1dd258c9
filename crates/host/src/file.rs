//! Files that must be whole or absent: atomic publishing, temporary directories that another process
//! can tell from abandoned ones, lock files that name their holder, and checks of free space.
//!
//! Everything durable follows one order: write beside, fsync, rename, fsync the directory. A crash
//! between any two steps leaves the old state plus garbage with a dot name, which [`sweep`] removes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

/// Tries at a free temporary name before giving up; more than one is only needed against leftovers.
const NAME_TRIES: u32 = 100;
/// A lock file holds a process id; whatever is longer is not ours.
const LOCK_FILE_MAX: u64 = 64;

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
    let (beside, mut file) = unique_file(parent_of(path), &format!("{name}.tmp"))?;
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

/// Creates an empty file, locked against [`sweep`] until it is closed.
fn unique_file(parent: &Path, stem: &str) -> Result<(PathBuf, File), Error> {
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

/// A name nobody else uses: `.stem-pid-number`.
fn unique_name(stem: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".{stem}-{}-{number}", process::id())
}

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
        self.path.as_deref().unwrap_or(Path::new(""))
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

impl Drop for TempDir {
    fn drop(&mut self) {
        let Some(path) = self.path.take() else { return };
        if let Err(error) = remove_all(&path) {
            tracing::warn!(%error, path = %path.display(), "temporary directory left behind");
        }
    }
}

/// Locks what a path leads to for this process. `None`: another has it, or it is gone.
fn lock_path(path: &Path) -> Result<Option<File>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    Ok((try_lock(&file, path)? && is_same(&file, path)).then_some(file))
}

/// Takes the exclusive lock of an open file, unless somebody has it.
fn try_lock(file: &File, path: &Path) -> Result<bool, Error> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(failed("lock", path)(errno.into())),
    }
}

/// Whether the path still leads to the open file.
fn is_same(file: &File, path: &Path) -> bool {
    let key = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (open, named) = (file.metadata().map(key), path.symlink_metadata().map(key));
    matches!((open, named), (Ok(open), Ok(named)) if open == named)
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

/// A lock on a directory that is in use, held until the value or the process ends. It follows the
/// directory through renames.
#[derive(Debug)]
pub struct DirLock {
    _dir: File,
}

impl DirLock {
    /// Shares the directory with other users; waits while somebody removes it. `None`: it is gone.
    pub fn shared(path: &Path) -> Result<Option<DirLock>, Error> {
        let dir = match File::open(path) {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", path)(error)),
        };
        let locked =
            rustix::io::retry_on_intr(|| rustix::fs::flock(&dir, FlockOperation::LockShared));
        locked.map_err(|errno| failed("lock", path)(errno.into()))?;
        Ok(is_same(&dir, path).then_some(DirLock { _dir: dir }))
    }

    /// Takes the directory alone. `None`: somebody uses it, or it is gone.
    pub fn exclusive(path: &Path) -> Result<Option<DirLock>, Error> {
        Ok(lock_path(path)?.map(|dir| DirLock { _dir: dir }))
    }
}

/// Whether somebody holds the directory's exclusive lock: it is being written or removed.
pub fn is_claimed(path: &Path) -> Result<bool, Error> {
    let dir = match File::open(path) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed("open", path)(error)),
    };
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(failed("lock", path)(errno.into())),
    }
}

/// An exclusive lock, held until the value or the process ends. The file stays: removing it would let
/// two processes hold locks of the same name.
#[derive(Debug)]
pub struct LockFile {
    _file: File,
}

impl LockFile {
    /// Takes the lock as soon as its holder lets go; for locks that are held only for moments.
    pub fn wait(path: &Path) -> Result<LockFile, Error> {
        let file = open_lock(path)?;
        let locked =
            rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive));
        locked.map_err(|errno| failed("lock", path)(errno.into()))?;
        LockFile::signed(file, path)
    }

    /// Takes the lock, or says who has it. Never waits.
    pub fn acquire(path: &Path) -> Result<LockFile, Error> {
        let file = open_lock(path)?;
        if !try_lock(&file, path)? {
            return Err(Error::Locked {
                path: path.to_owned(),
                holder: read_holder(&file),
            });
        }
        LockFile::signed(file, path)
    }

    /// Notes the holder for those who come next.
    fn signed(mut file: File, path: &Path) -> Result<LockFile, Error> {
        let noted = file
            .set_len(0)
            .and_then(|()| writeln!(file, "{}", process::id()));
        noted.map_err(failed("write", path))?;
        Ok(LockFile { _file: file })
    }
}

fn open_lock(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(true).create(true).truncate(false);
    let file = opened.mode(0o600).open(path);
    file.map_err(failed("open", path))
}

fn read_holder(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(LOCK_FILE_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Bytes that this process may still write to the file system that holds `path`.
pub fn free_bytes(path: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(path);
    let stat = stat.map_err(|errno| failed("ask the free space of", path)(errno.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
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
