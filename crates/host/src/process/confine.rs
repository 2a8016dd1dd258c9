//! Confinement of a process to what it inherits, between fork and exec.
//!
//! ```text
//!   fork into an own pid namespace ─► own net, ipc, uts ─► prepared root ─► limits ─► own user, no privileges
//!     ─► system call filter ─► exec
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, Gid, LinkNameSpaceType, Uid, UnshareFlags};
use seccompiler::BpfProgram;

use super::filter::{self, Filters};
use super::root::Root;
use crate::sys;

/// How a process is confined. What is absent is as in this process.
#[derive(Debug, Clone)]
pub struct Confinement {
    /// The only files it can name, and namespaces of its own: pid, net, ipc, uts. Needs root.
    pub root: Option<Root>,
    /// Whom it runs as, without any capability. Needs root.
    pub user: Option<User>,
    /// With a root of its own, it still runs in the network namespace it is started in, instead of an empty one.
    pub given_network: bool,
    /// It may make sockets, of the UNIX family alone: no other leads out of it, whatever network it is in.
    pub own_sockets: bool,
    /// The most bytes a file that it writes may have.
    pub file_bytes: u64,
    /// The most files it may have open.
    pub open_files: u64,
    /// The most threads that its user may have; nothing is limited without a user of its own.
    pub threads: u64,
}

/// A user for one process, and its groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User and group id.
    pub id: u32,
    /// Groups besides.
    pub groups: Vec<u32>,
}

/// A confinement as values that need no allocation after the fork.
pub(super) struct Prepared {
    root: Option<RawFd>,
    given_network: bool,
    own_sockets: bool,
    user: Option<(u32, Vec<Gid>)>,
    file_bytes: u64,
    open_files: u64,
    threads: u64,
    filters: &'static Filters,
    /// Keeps the files open until after the fork.
    _confinement: Confinement,
}

impl Prepared {
    pub(super) fn new(confinement: Confinement) -> io::Result<Prepared> {
        let user = confinement.user.as_ref();
        Ok(Prepared {
            root: confinement.root.as_ref().map(|r| r.as_fd().as_raw_fd()),
            given_network: confinement.given_network,
            own_sockets: confinement.own_sockets,
            user: user.map(|u| (u.id, u.groups.iter().map(|g| Gid::from_raw(*g)).collect())),
            file_bytes: confinement.file_bytes,
            open_files: confinement.open_files,
            threads: confinement.threads,
            filters: filter::filters()?,
            _confinement: confinement,
        })
    }

    /// Whether the process begins a pid namespace.
    pub(super) fn own_pids(&self) -> bool {
        self.root.is_some()
    }

    /// Whether the process runs in the network namespace it is started in.
    pub(super) fn keeps_network(&self) -> bool {
        self.root.is_none() || self.given_network
    }

    /// In the child: everything but the filter. Raw system calls only.
    pub(super) fn enter(&self) -> io::Result<()> {
        if let Some(root) = self.root {
            let mut own = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
            own.set(UnshareFlags::NEWNET, !self.given_network);
            sys::unshare_own(own)?;
            // Comes with its root directory as root and working directory.
            let root = sys::borrow_in_child(root);
            rustix::thread::move_into_link_name_space(root, Some(LinkNameSpaceType::Mount))?;
        }
        for (resource, most) in [
            (Resource::Core, 0),
            (Resource::Fsize, self.file_bytes),
            (Resource::Nofile, self.open_files),
        ] {
            limit(resource, most)?;
        }
        if let Some((id, groups)) = &self.user {
            limit(Resource::Nproc, self.threads)?;
            become_user(*id, groups)?;
        }
        Ok(rustix::thread::set_no_new_privs(true)?)
    }

    /// In the child: the filter, which lets exec and little else pass.
    pub(super) fn filter(&self) -> io::Result<()> {
        let install = |filter: &BpfProgram| {
            // The kernel has set errno; the error's own text would have to be allocated.
            seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())
        };
        install(match self.own_sockets {
            true => &self.filters.allowed_with_sockets,
            false => &self.filters.allowed,
        })?;
        install(&self.filters.deadly)
    }
}

fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let most = Some(most);
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    Ok(rustix::process::setrlimit(resource, limit)?)
}

/// Leaves root, and with it every capability, for good.
fn become_user(id: u32, groups: &[Gid]) -> io::Result<()> {
    // The kernel knows fewer than the 64 that fit its sets, and says so.
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Err(rustix::io::Errno::INVAL) => break,
            removed => removed?,
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_groups(groups)?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    Ok(rustix::thread::set_thread_res_uid(user, user, user)?)
}

/// While this lives, children of this thread begin pid namespaces of their own.
pub(super) struct OwnPids(OwnedFd);

impl OwnPids {
    pub(super) fn begin() -> io::Result<OwnPids> {
        let back: OwnedFd = File::open("/proc/thread-self/ns/pid")?.into();
        sys::unshare_own(UnshareFlags::NEWPID)?;
        Ok(OwnPids(back))
    }

    /// From now on children are born where this thread is.
    pub(super) fn end(self) -> io::Result<()> {
        let kind = Some(LinkNameSpaceType::ProcessID);
        Ok(rustix::thread::move_into_link_name_space(
            self.0.as_fd(),
            kind,
        )?)
    }
}
