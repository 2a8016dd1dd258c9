//! Scratch directories, durable writes, and clearing away after builds that were killed.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::mount::UnmountFlags;

use super::io_error;
use crate::Error;

/// Processes of a stopped tool take a moment to die, and may still write meanwhile.
const REMOVE_TRIES: u32 = 40;
const REMOVE_PAUSE: Duration = Duration::from_millis(50);
const MOUNTS: &str = "/proc/self/mountinfo";

/// A directory for one build, removed when the build ends in whatever way.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub(super) fn new(tmp: &Path) -> Result<Scratch, Error> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = tmp.join(format!("{}-{count}", std::process::id()));
        // Left by a process that had our id.
        if path.exists() {
            remove(&path);
        }
        fs::create_dir(&path).map_err(io_error("create", &path))?;
        Ok(Scratch { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes everything in `tmp`. Only for the holder of the lock.
pub(super) fn leftovers(tmp: &Path) {
    for entry in fs::read_dir(tmp).into_iter().flatten().flatten() {
        tracing::info!(path = %entry.path().display(), "removing what a killed build left");
        remove(&entry.path());
    }
}

fn remove(path: &Path) {
    for _ in 0..REMOVE_TRIES {
        // Never removes through a mount: it could be the host's own /dev.
        if unmount_below(path) {
            let removed = if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
            if removed.is_ok() || !path.exists() {
                return;
            }
        }
        std::thread::sleep(REMOVE_PAUSE);
    }
    tracing::error!(path = %path.display(), "could not remove a build's directory");
}

/// Detaches every mount below a path; says whether none is left.
fn unmount_below(path: &Path) -> bool {
    let Ok(mounts) = fs::read(MOUNTS) else {
        return false;
    };
    let mut clean = true;
    // The newest first: it may lie upon an older one.
    for mount in mount_points(&mounts)
        .iter()
        .rev()
        .filter(|mount| mount.starts_with(path))
    {
        clean &= rustix::mount::unmount(mount, UnmountFlags::DETACH).is_ok();
    }
    clean
}

/// The fifth field of each line, in which blanks and the like are written in octal.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|b| *b == b'\n');
    let field = |line: &[u8]| line.split(|b| *b == b' ').nth(4).map(unescaped);
    lines.filter_map(field).collect()
}

fn unescaped(field: &[u8]) -> PathBuf {
    let mut out = Vec::new();
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| after.get(..3)).flatten();
        let code = octal.and_then(|o| u8::from_str_radix(std::str::from_utf8(o).ok()?, 8).ok());
        match code {
            Some(code) => {
                out.push(code);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Writes a new file and makes it durable.
pub(super) fn write_file(path: &Path, content: &[u8]) -> Result<(), Error> {
    let mut file = File::create_new(path).map_err(io_error("create", path))?;
    file.write_all(content).map_err(io_error("write", path))?;
    file.sync_all().map_err(io_error("write", path))
}

/// Puts a file in the place of another, whole or not at all.
pub(super) fn replace_file(path: &Path, tmp: &Path, content: &[u8]) -> Result<(), Error> {
    let scratch = Scratch::new(tmp)?;
    let new = scratch.path().join("new");
    write_file(&new, content)?;
    fs::rename(&new, path).map_err(io_error("replace", path))?;
    sync_dir(path.parent().unwrap_or_else(|| Path::new("/")))
}

pub(super) fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error("sync", path))
}

/// Makes a directory and all below it durable.
pub(super) fn sync_tree(path: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(path).map_err(io_error("list", path))? {
        let entry = entry.map_err(io_error("list", path))?;
        let kind = entry.file_type().map_err(io_error("list", path))?;
        let below = entry.path();
        if kind.is_dir() {
            sync_tree(&below)?;
        } else {
            File::open(&below)
                .and_then(|f| f.sync_all())
                .map_err(io_error("sync", &below))?;
        }
    }
    sync_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_and_unescaped() {
        let table =
            b"36 35 98:0 / /mnt/a\\040b rw - ext4 /dev/x rw\n\n37 35 0:1 / /proc rw - p p\n";
        assert_eq!(
            mount_points(table),
            [Path::new("/mnt/a b"), Path::new("/proc")]
        );
        assert_eq!(unescaped(b"a\\"), Path::new("a\\"));
        assert_eq!(unescaped(b"x"), Path::new("x"));
    }

    #[test]
    fn scratch_is_gone_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        fs::create_dir_all(scratch.path().join("a/b")).unwrap();
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
    }
}
