//! Confinement. A template confines itself once, so that its forks inherit an empty root and no
//! network for nothing; a sandbox gives up its user on top of it.

use std::io;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{Gid, Uid, UnshareFlags};

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespaces or the empty root could not be made.
    #[error("cannot {step}: run as root, or with --no-jail to go without")]
    Root {
        /// The step.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Privileges could not be dropped.
    #[error("cannot become user {uid} and group {gid}")]
    User {
        /// The user wanted.
        uid: u32,
        /// The group wanted.
        gid: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// Moves this process into its own mount, network, IPC and UTS namespaces with an empty, read-only
/// root. Everything it needs later must be open. Core dumps, which would hold guest memory, are off.
pub fn enter_empty_root() -> Result<(), Error> {
    let at = |step| {
        move |e: rustix::io::Errno| Error::Root {
            step,
            source: e.into(),
        }
    };
    let no_core = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, no_core).map_err(at("forbid core dumps"))?;
    forget_limits_of_users();
    let spaces =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    unshare(spaces).map_err(at("leave the host's namespaces"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(at("make mounts private"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount(
        "forkd-empty",
        "/proc",
        "tmpfs",
        flags,
        Some(c"size=0,mode=0555"),
    )
    .map_err(at("mount an empty root"))?;
    rustix::process::chdir("/proc").map_err(at("enter the empty root"))?;
    // The same directory twice: the old root ends up on top of the new one and is detached.
    rustix::process::pivot_root(".", ".").map_err(at("change the root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(at("detach the old root"))?;
    rustix::process::chdir("/").map_err(at("enter the new root"))
}

/// What is counted by user must not run out because another sandbox has the same one. The memory of
/// processes and signals is counted by control group all the same.
fn forget_limits_of_users() {
    let none = Rlimit {
        current: None,
        maximum: None,
    };
    for counted in [Resource::Nproc, Resource::Sigpending] {
        // Without the capability to raise limits they stay as they are.
        _ = rustix::process::setrlimit(counted, none);
    }
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    #[expect(
        deprecated,
        reason = "the safe form is enough: CLONE_FILES is not asked for"
    )]
    rustix::thread::unshare(flags)
}

/// Gives up root for good: groups, group, user, and with them every capability. Nobody but root can
/// trace the process or read its memory afterwards, not even a process of the same user.
pub fn become_user(uid: u32, gid: u32) -> Result<(), Error> {
    let failed = |e: rustix::io::Errno| Error::User {
        uid,
        gid,
        source: e.into(),
    };
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_no_new_privs(true).map_err(failed)?;
    rustix::thread::set_thread_groups(&[]).map_err(failed)?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(failed)?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(failed)?;
    // Changing the user has done so, unless the host's fs.suid_dumpable says otherwise.
    let hidden = rustix::process::DumpableBehavior::NotDumpable;
    rustix::process::set_dumpable_behavior(hidden).map_err(failed)
}

/// Names the process for people who look at a process list.
pub fn name_process(name: &str) {
    let mut shown = b"vm:".to_vec();
    // The kernel keeps 15 bytes; the end of an id tells more than its beginning.
    let tail = name.len().saturating_sub(12);
    shown.extend(
        name.bytes()
            .skip(tail)
            .filter(|byte| byte.is_ascii_graphic()),
    );
    if let Ok(name) = std::ffi::CString::new(shown) {
        _ = rustix::thread::set_name(&name);
    }
}
