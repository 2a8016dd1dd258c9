//! Locks on files and directories. The kernel ends them with the process that holds them, however it
//! ends, so a lock left over does not exist.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{Error, failed};
use crate::process::identity_of;

/// A lock file holds a process id; whatever is longer is not ours.
const LOCK_FILE_MAX: u64 = 64;

/// How long what a dead holder left may keep its lock.
const LEFT_WITHIN: Duration = Duration::from_secs(5);

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

    /// Takes the lock, or says who has it. Waits only for what a dead holder left: a child that it was about to
    /// start shares its open files until it runs its own program.
    pub fn acquire(path: &Path) -> Result<LockFile, Error> {
        let started = Instant::now();
        loop {
            let file = open_lock(path)?;
            if try_lock(&file, path)? {
                return LockFile::signed(file, path);
            }
            let holder = read_holder(&file);
            let is_dead = holder.is_some_and(|pid| matches!(identity_of(pid), Ok(None)));
            if !is_dead || started.elapsed() > LEFT_WITHIN {
                return Err(Error::Locked {
                    path: path.to_owned(),
                    holder,
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
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

/// Locks what a path leads to for this process. `None`: another has it, or it is gone.
pub(super) fn lock_path(path: &Path) -> Result<Option<File>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    Ok((try_lock(&file, path)? && is_same(&file, path)).then_some(file))
}

/// Takes the exclusive lock of an open file, unless somebody has it.
pub(super) fn try_lock(file: &File, path: &Path) -> Result<bool, Error> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(failed("lock", path)(errno.into())),
    }
}

/// Whether the path still leads to the open file.
pub(super) fn is_same(file: &File, path: &Path) -> bool {
    let key = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (open, named) = (file.metadata().map(key), path.symlink_metadata().map(key));
    matches!((open, named), (Ok(open), Ok(named)) if open == named)
}
