//! Named network namespaces, where `ip netns` finds them too.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where names are kept; the convention of iproute2.
pub const DIRECTORY: &str = "/run/netns";

/// Why a namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of names cannot be prepared.
    #[error("cannot prepare {DIRECTORY} for network namespaces; this needs root and CAP_SYS_ADMIN")]
    Directory(#[source] io::Error),
    /// The name is taken.
    #[error(
        "a network namespace {name} exists already; `ip netns del {name}` removes it if nobody uses it"
    )]
    Exists {
        /// The name.
        name: String,
    },
    /// The kernel is set to have no more of them.
    #[error(
        "cannot make the network namespace {name}: {setting} is {now}, and so many there are; allow more with \
         `sysctl -w {setting}=...`"
    )]
    Limit {
        /// The namespace.
        name: String,
        /// The setting, as sysctl names it.
        setting: &'static str,
        /// What it is set to, in words: whoever cannot read it is told so.
        now: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A step failed.
    #[error("cannot {step} the network namespace {name}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// The namespace.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A network namespace with a name. Dropping it does not delete it: [`delete`] does.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: OwnedFd,
}

impl Netns {
    /// Makes a namespace, with its loopback device down, and gives it a name.
    pub fn create(name: &str) -> Result<Self, Error> {
        Ok(Self::create_with(name, || ())?.0)
    }

    /// As [`Netns::create`], and runs `work` inside it once it has its name, in a thread of its own. Sockets made there
    /// stay there.
    pub fn create_with<T: Send>(
        name: &str,
        work: impl FnOnce() -> T + Send,
    ) -> Result<(Self, T), Error> {
        prepare_directory().map_err(Error::Directory)?;
        let path = path_of(name);
        let taken = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists {
                name: name.to_owned(),
            },
            _ => step("name", name)(source),
        };
        File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(taken)?;
        let made = in_new_thread(|| Ok(bind_new(name, &path).map(|()| work())));
        let done = match made.map_err(step("make", name)).flatten() {
            Ok(done) => done,
            Err(e) => {
                // A name without a namespace is of no use to anybody.
                let _ = fs::remove_file(&path);
                return Err(e);
            }
        };
        let netns = Self::open(name)?;
        let netns = netns.ok_or_else(|| step("open", name)(io::ErrorKind::NotFound.into()))?;
        Ok((netns, done))
    }

    /// Opens a namespace by its name; `None` when there is none.
    pub fn open(name: &str) -> Result<Option<Self>, Error> {
        match File::open(path_of(name)) {
            Ok(file) => Ok(Some(Self {
                name: name.to_owned(),
                file: file.into(),
            })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(step("open", name)(e)),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` in a thread of its own inside the namespace. Sockets made there stay there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
        enter(self.file.as_fd(), work).map_err(step("enter", &self.name))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Makes a namespace without a name, with its loopback device down. It ends with the last process, socket and file
/// in it, this one included.
pub fn nameless() -> io::Result<OwnedFd> {
    in_new_thread(|| {
        crate::sys::unshare_network()?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    })
}

/// Runs `work` in a thread of its own inside a namespace. Sockets made there stay there.
pub fn enter<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    in_new_thread(|| {
        move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))?;
        Ok(work())
    })
}

/// Takes the name away. The namespace ends, and its devices with it, when the last process, socket and file in it
/// are gone. Having no such name is no error.
pub fn delete(name: &str) -> Result<(), Error> {
    let path = path_of(name);
    match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
        // Nothing is mounted there: a crash between making the name and the namespace.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(step("unmount", name)(e.into())),
    }
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(step("delete", name)(e)),
        _ => Ok(()),
    }
}

/// The names there are that begin so.
pub fn list(prefix: &str) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(Error::Directory(e)),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with(prefix)).collect())
}

fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn step<'a>(step: &'static str, name: &'a str) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Step {
        step,
        name: name.to_owned(),
        source,
    }
}

/// A thread has its own namespaces, and takes them along when it ends.
fn in_new_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, work)
            .map_err(no_thread)?;
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Names the limits that a thread may meet: the kernel says "try again", which helps nobody.
fn no_thread(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::other(
            "no more threads can be started; see pids.max of the control group, `ulimit -u`, kernel.pid_max and \
             kernel.threads-max",
        ),
        _ => error,
    }
}

fn bind_new(name: &str, path: &Path) -> Result<(), Error> {
    let counted = |setting| {
        move |source: io::Error| match source.kind() {
            io::ErrorKind::StorageFull => at_limit(name, setting, source),
            _ => step("make", name)(source),
        }
    };
    crate::sys::unshare_network().map_err(counted("user.max_net_namespaces"))?;
    let bound = rustix::mount::mount_bind("/proc/thread-self/ns/net", path);
    bound.map_err(|errno| counted("fs.mount-max")(errno.into()))
}

fn at_limit(name: &str, setting: &'static str, source: io::Error) -> Error {
    let now = fs::read_to_string(format!("/proc/sys/{}", setting.replace('.', "/")));
    Error::Limit {
        name: name.to_owned(),
        setting,
        now: now.map_or_else(
            |e| format!("what cannot be read ({e})"),
            |n| n.trim().to_owned(),
        ),
        source,
    }
}

/// Names are mounts. They must spread to other mount namespaces and vanish from them again, or a name deleted here
/// would keep its namespace alive wherever a service has a mount namespace of its own.
fn prepare_directory() -> io::Result<()> {
    fs::create_dir_all(DIRECTORY)?;
    let shared = MountPropagationFlags::SHARED;
    // What is mounted below a shared mount is shared. To go through all that is there already, each time, would cost more
    // with every name.
    match rustix::mount::mount_change(DIRECTORY, shared) {
        Err(rustix::io::Errno::INVAL) => {
            let flags = MountFlags::BIND | MountFlags::REC;
            rustix::mount::mount(DIRECTORY, DIRECTORY, "none", flags, None)?;
            let all = shared | MountPropagationFlags::REC;
            Ok(rustix::mount::mount_change(DIRECTORY, all)?)
        }
        shared => Ok(shared?),
    }
}
