//! Writes into a root file system that is being made, and never outside of it.
//!
//! Paths and links in an archive are somebody else's choice. Every parent is resolved by the
//! kernel with the tree as its root (`openat2`, `RESOLVE_IN_ROOT`), so that an absolute link or
//! `..` ends inside; the last component is never followed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;

/// Something could not be put into the tree, or must not be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path points outside, or at nothing.
    #[error("the path `{}` leaves the root file system or is no path", path.escape_debug())]
    Unsafe {
        /// The path as given.
        path: String,
    },
    /// A system call failed.
    #[error("cannot {step} {path} in the root file system")]
    Io {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Owner, permissions and times of an entry.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attributes {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch.
    pub(crate) mtime: i64,
    /// Extended attributes by name.
    pub(crate) xattrs: Vec<(OsString, Vec<u8>)>,
}

/// A directory that becomes a root file system.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
    real: PathBuf,
    /// Only root can give files away.
    owner: bool,
}

/// A resolved place for an entry: an open parent and a name in it.
#[derive(Debug)]
pub(crate) struct Place {
    parent: OwnedFd,
    name: OsString,
    /// Where it really is, links resolved, relative to the root.
    pub(crate) real: PathBuf,
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |errno| Error::Io {
        step,
        path,
        source: errno.into(),
    }
}

/// Splits a path into plain names. `..`, absolute paths and zero bytes are refused, never mended.
pub(crate) fn relative(path: &[u8]) -> Result<PathBuf, Error> {
    let refused = || Error::Unsafe {
        path: String::from_utf8_lossy(path).into_owned(),
    };
    if path.contains(&0) || path.len() > 4096 {
        return Err(refused());
    }
    let mut clean = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            _ => return Err(refused()),
        }
    }
    Ok(clean)
}

impl Tree {
    pub(crate) fn open(path: &Path) -> Result<Tree, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::open(path, flags, Mode::empty()).map_err(io_error("open", path))?;
        let real = path.canonicalize();
        let real = real.map_err(|source| Error::Io {
            step: "open",
            path: path.into(),
            source,
        })?;
        Ok(Tree {
            root,
            real,
            owner: rustix::process::geteuid().is_root(),
        })
    }

    /// Resolves an entry's place, making parents that are missing. `path` is from [`relative`].
    pub(crate) fn place(&self, path: &Path) -> Result<Place, Error> {
        let Some(name) = path.file_name() else {
            return Err(Error::Unsafe {
                path: path.display().to_string(),
            });
        };
        let parent = self.directory_at(path.parent().unwrap_or_else(|| Path::new("")))?;
        let link = format!("/proc/self/fd/{}", parent.as_raw_fd());
        let real = std::fs::read_link(&link).map_err(|source| Error::Io {
            step: "resolve",
            path: path.into(),
            source,
        })?;
        let real = real.strip_prefix(&self.real).unwrap_or(&real).join(name);
        Ok(Place {
            parent,
            name: name.to_owned(),
            real,
        })
    }

    fn directory_at(&self, path: &Path) -> Result<OwnedFd, Error> {
        match self.resolve(path) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(io_error("open the directory", path)),
        }
        let mut so_far = PathBuf::new();
        let mut parent = self.resolve(&so_far).map_err(io_error("open", path))?;
        for name in path {
            so_far.push(name);
            parent = match self.resolve(&so_far) {
                Err(Errno::NOENT) => {
                    fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))
                        .map_err(io_error("make the directory", &so_far))?;
                    fs::chmodat(&parent, name, Mode::from_raw_mode(0o755), AtFlags::empty())
                        .map_err(io_error("set the mode of", &so_far))?;
                    self.resolve(&so_far)
                }
                other => other,
            }
            .map_err(io_error("open the directory", &so_far))?;
        }
        Ok(parent)
    }

    fn resolve(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        fs::openat2(&self.root, path, flags, Mode::empty(), within)
    }

    /// Removes an entry and all below it; nothing there is fine.
    pub(crate) fn remove(&self, path: &Path) -> Result<(), Error> {
        let parent = path.parent().unwrap_or_else(|| Path::new(""));
        match self.resolve(parent) {
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(io_error("open the directory", parent)(errno)),
            Ok(_) => self.clear(&self.place(path)?),
        }
    }

    /// Removes what is at a place; nothing there is fine.
    pub(crate) fn clear(&self, at: &Place) -> Result<(), Error> {
        match fs::unlinkat(&at.parent, &at.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => {
                let dir = Path::new("/proc/self/fd").join(at.parent.as_raw_fd().to_string());
                std::fs::remove_dir_all(dir.join(&at.name)).map_err(|source| Error::Io {
                    step: "remove",
                    path: at.real.clone(),
                    source,
                })
            }
            Err(errno) => Err(io_error("remove", &at.real)(errno)),
        }
    }

    /// Makes a directory, or gives an existing one new attributes.
    pub(crate) fn directory(&self, at: &Place, a: &Attributes) -> Result<(), Error> {
        if !self.is_directory(at) {
            self.clear(at)?;
            fs::mkdirat(&at.parent, &at.name, Mode::from_raw_mode(0o700))
                .map_err(io_error("make the directory", &at.real))?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&at.parent, &at.name, flags, Mode::empty())
            .map_err(io_error("open", &at.real))?;
        self.attributes(&fd, at, a)
    }

    /// Writes a file from a reader.
    pub(crate) fn file(
        &self,
        at: &Place,
        content: &mut dyn Read,
        a: &Attributes,
    ) -> Result<u64, Error> {
        self.clear(at)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&at.parent, &at.name, flags, Mode::from_raw_mode(0o600))
            .map_err(io_error("create", &at.real))?;
        let mut file = File::from(fd);
        let written = io::copy(content, &mut file).map_err(|source| Error::Io {
            step: "write",
            path: at.real.clone(),
            source,
        })?;
        self.attributes(&file.into(), at, a)?;
        Ok(written)
    }

    /// Makes a symbolic link; its target may be anything, for nothing here follows it outside.
    pub(crate) fn symlink(&self, at: &Place, target: &[u8], a: &Attributes) -> Result<(), Error> {
        self.clear(at)?;
        fs::symlinkat(OsStr::from_bytes(target), &at.parent, &at.name)
            .map_err(io_error("link", &at.real))?;
        self.own_by_name(at, a)
    }

    /// Makes another name for a file of the tree.
    pub(crate) fn hard_link(&self, at: &Place, target: &Place) -> Result<(), Error> {
        if at.real == target.real {
            return Ok(());
        }
        // Looked at first: a link to nothing must not cost what is there already.
        fs::statat(&target.parent, &target.name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(io_error("find the link target", &target.real))?;
        self.clear(at)?;
        fs::linkat(
            &target.parent,
            &target.name,
            &at.parent,
            &at.name,
            AtFlags::empty(),
        )
        .map_err(io_error("link", &at.real))
    }

    /// Makes a named pipe.
    pub(crate) fn fifo(&self, at: &Place, a: &Attributes) -> Result<(), Error> {
        self.clear(at)?;
        let mode = Mode::from_raw_mode(a.mode & 0o7777);
        fs::mknodat(&at.parent, &at.name, FileType::Fifo, mode, 0)
            .map_err(io_error("make the pipe", &at.real))?;
        self.own_by_name(at, a)
    }

    /// Writes a small file of ours.
    pub(crate) fn write(&self, path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
        let attributes = Attributes {
            mode,
            ..Attributes::default()
        };
        self.file(&self.place(path)?, &mut &content[..], &attributes)
            .map(|_| ())
    }

    /// Gives every directory its time: the recorded one, or the epoch.
    pub(crate) fn date_directories(
        &self,
        times: &std::collections::HashMap<PathBuf, i64>,
    ) -> Result<(), Error> {
        let mut pending = vec![PathBuf::new()];
        while let Some(dir) = pending.pop() {
            let failed = |source| Error::Io {
                step: "date",
                path: dir.clone(),
                source,
            };
            for entry in std::fs::read_dir(self.real.join(&dir)).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                if entry.file_type().map_err(failed)?.is_dir() {
                    pending.push(dir.join(entry.file_name()));
                }
            }
            let fd = self.resolve(&dir).map_err(io_error("open", &dir))?;
            let time = stamp(times.get(&dir).copied().unwrap_or(0));
            fs::utimensat(&fd, ".", &time, AtFlags::empty()).map_err(io_error("date", &dir))?;
        }
        Ok(())
    }

    /// The names in a directory of the tree; none if it is not there.
    pub(crate) fn names(&self, dir: &Path) -> Result<Vec<OsString>, Error> {
        let fd = match self.resolve(dir) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
            Err(errno) => return Err(io_error("list", dir)(errno)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::openat(&fd, ".", flags, Mode::empty()).map_err(io_error("list", dir))?;
        let mut names = Vec::new();
        for entry in fs::Dir::read_from(&fd).map_err(io_error("list", dir))? {
            let name = entry
                .map_err(io_error("list", dir))?
                .file_name()
                .to_bytes()
                .to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    /// Whether a directory, not a link to one, is at a place.
    pub(crate) fn is_directory(&self, at: &Place) -> bool {
        fs::statat(&at.parent, &at.name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir())
    }

    fn attributes(&self, fd: &OwnedFd, at: &Place, a: &Attributes) -> Result<(), Error> {
        if self.owner {
            // Before the mode: giving a file away clears its set-user-id bit.
            let (uid, gid) = (fs::Uid::from_raw(a.uid), fs::Gid::from_raw(a.gid));
            fs::fchown(fd, Some(uid), Some(gid)).map_err(io_error("give away", &at.real))?;
            for (name, value) in &a.xattrs {
                fs::fsetxattr(fd, name.as_os_str(), value, fs::XattrFlags::empty())
                    .map_err(io_error("set an attribute of", &at.real))?;
            }
        }
        fs::fchmod(fd, Mode::from_raw_mode(a.mode & 0o7777))
            .map_err(io_error("set the mode of", &at.real))?;
        fs::futimens(fd, &stamp(a.mtime)).map_err(io_error("date", &at.real))
    }

    fn own_by_name(&self, at: &Place, a: &Attributes) -> Result<(), Error> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        if self.owner {
            let (uid, gid) = (fs::Uid::from_raw(a.uid), fs::Gid::from_raw(a.gid));
            fs::chownat(&at.parent, &at.name, Some(uid), Some(gid), flags)
                .map_err(io_error("give away", &at.real))?;
        }
        fs::utimensat(&at.parent, &at.name, &stamp(a.mtime), flags)
            .map_err(io_error("date", &at.real))
    }
}

fn stamp(seconds: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

#[cfg(test)]
mod tests;
