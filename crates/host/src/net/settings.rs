//! The settings of one network namespace, below `/proc/sys/net`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// A directory of settings of the namespace that the thread which opened it was in.
#[derive(Debug)]
pub struct Settings {
    directory: OwnedFd,
}

impl Settings {
    /// Opens a directory below `/proc/sys/net`, such as `ipv6/conf`.
    ///
    /// The kernel remembers such directories of all namespaces under the same name and looks through them one by one, some
    /// microseconds for each: among thousands of namespaces that is most of the time that a new one takes. So it is
    /// looked up once, and in a proc file system of its own, which remembers none, where one may be had.
    pub fn open(path: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match own_proc() {
            Ok(proc) => {
                let path = format!("sys/net/{path}");
                rustix::fs::openat(proc, path, flags, Mode::empty())?
            }
            Err(_) => rustix::fs::open(format!("/proc/sys/net/{path}"), flags, Mode::empty())?,
        };
        Ok(Self { directory })
    }

    /// Changes a setting.
    pub fn write(&self, name: &str, value: &str) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty())?;
        rustix::io::write(file, value.as_bytes())?;
        Ok(())
    }
}

/// A proc file system that is mounted nowhere; it goes with the last file of it.
fn own_proc() -> rustix::io::Result<OwnedFd> {
    let made = rustix::mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(made.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(made.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
