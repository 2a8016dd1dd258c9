//! A VM's own directory, where its sockets are; and errors that name a file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::Error;

/// The directory, opened, so that its sockets can be named in few bytes however deep it lies.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    dir: File,
}

impl RunDir {
    pub(crate) fn open(path: &Path) -> Result<RunDir, Error> {
        let dir = File::open(path).map_err(failed("open the run directory", path))?;
        let path = path.to_owned();
        Ok(RunDir { path, dir })
    }

    /// The path of a file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The names of sockets are limited to 108 bytes, paths of directories are not.
    pub(crate) fn short(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()).into()
    }

    /// A listening socket.
    pub(crate) fn listen(&self, name: &str) -> Result<UnixListener, Error> {
        let listener = UnixListener::bind(self.short(name));
        listener.map_err(failed("listen on", &self.file(name)))
    }

    /// A connection to a socket. Made before anybody accepts it, it waits in the socket's queue.
    pub(crate) fn connect(&self, name: &str) -> io::Result<tokio::net::UnixStream> {
        let stream = UnixStream::connect(self.short(name))?;
        stream.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(stream)
    }

    /// As [`RunDir::connect`], but never blocks: `WouldBlock` while the queue is full.
    pub(crate) async fn connect_later(&self, name: &str) -> io::Result<tokio::net::UnixStream> {
        tokio::net::UnixStream::connect(self.short(name)).await
    }
}

/// Adds step and path to an I/O error.
pub(crate) fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { step, path, source }
}
