//! Files of the host in a prepared root: laid over a name that was kept for them, for one process and for a time.

use std::fs::File;
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::{Error, Root, at, file_error, in_new_thread, own};
use crate::sys;

/// A file or directory of the host in a root.
#[derive(Debug, Clone, Copy)]
pub struct Lent<'a> {
    /// What it is here.
    pub source: &'a Path,
    /// Its name there: one of those kept by [`Contents`](super::Contents), the same kind of thing.
    pub name: &'a str,
    /// Whether it can be written there, as far as its own permissions allow.
    pub writable: bool,
}

impl Root {
    /// A root like this one, with these files besides. What is lent to it later, this one does not see.
    pub fn with(&self, lent: &[Lent<'_>]) -> Result<Root, Error> {
        in_new_thread(|| {
            let trees = lent.iter().map(clone_tree).collect::<Result<Vec<_>, _>>()?;
            self.enter_here()?;
            let unshared = sys::unshare_own(UnshareFlags::NEWNS);
            unshared.map_err(at("copy the prepared root"))?;
            for (lent, tree) in lent.iter().zip(trees) {
                attach(lent, &tree)?;
            }
            own()
        })
    }

    /// The root of a running process.
    pub fn of(pid: u32) -> Result<Root, Error> {
        let path = format!("/proc/{pid}/ns/mnt");
        let open = File::open(&path).map_err(file_error("open", Path::new(&path)))?;
        Ok(Root(std::sync::Arc::new(open.into())))
    }

    /// Lends a file to whoever runs in this root now.
    pub fn lend(&self, lent: &Lent<'_>) -> Result<(), Error> {
        in_new_thread(|| {
            let tree = clone_tree(lent)?;
            self.enter_here()?;
            attach(lent, &tree)
        })
    }

    /// Takes the file under this name back. Who has it open keeps it open.
    pub fn take_back(&self, name: &str) -> Result<(), Error> {
        in_new_thread(|| {
            self.enter_here()?;
            let path = Path::new("/").join(name);
            let taken = rustix::mount::unmount(&path, UnmountFlags::DETACH);
            taken.map_err(|errno| file_error("take back", &path)(errno.into()))
        })
    }

    fn enter_here(&self) -> Result<(), Error> {
        // Only a thread with a root and a working directory of its own can be moved.
        sys::unshare_own(UnshareFlags::FS).map_err(at("leave the host's root"))?;
        let kind = Some(LinkNameSpaceType::Mount);
        let entered =
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(self), kind);
        entered.map_err(at("enter a prepared root"))
    }
}

/// A mount of this file that is nowhere yet.
fn clone_tree(lent: &Lent<'_>) -> Result<std::os::fd::OwnedFd, Error> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, lent.source, flags);
    tree.map_err(|errno| file_error("lend", lent.source)(errno.into()))
}

fn attach(lent: &Lent<'_>, tree: &std::os::fd::OwnedFd) -> Result<(), Error> {
    let target = Path::new("/").join(lent.name);
    let failed = |step, errno: rustix::io::Errno| file_error(step, &target)(errno.into());
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let moved = rustix::mount::move_mount(tree, "", CWD, &target, flags);
    moved.map_err(|errno| failed("lay a file over", errno))?;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    flags.set(MountFlags::RDONLY, !lent.writable);
    let guarded = rustix::mount::mount_remount(&target, flags, c"");
    guarded.map_err(|errno| failed("guard", errno))
}
