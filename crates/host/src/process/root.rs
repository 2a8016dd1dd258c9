//! A root file system that holds a program, what it needs to run, and nothing else of this host. Made once as a
//! mount namespace; entering it costs one system call.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::sys;

mod lend;

pub use lend::Lent;

/// Where a root may be put together, in a mount namespace that nobody else sees: directories that are there
/// anyway. One that hides none of the files is taken.
const PLACES: [&str; 5] = ["/mnt", "/media", "/srv", "/opt", "/tmp"];
/// The most bytes of an ELF file's head that are read.
const HEAD: usize = 4096;
/// `PT_INTERP`; elf(5).
const INTERPRETER: u32 = 3;

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that it is to hold cannot be used.
    #[error("cannot {step} {}", .path.display())]
    File {
        /// The step.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The namespace cannot be made.
    #[error("cannot {step}; this needs root and CAP_SYS_ADMIN")]
    Namespace {
        /// The step.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A prepared root. Clones are the same root.
#[derive(Debug, Clone)]
pub struct Root(Arc<OwnedFd>);

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a root holds, besides a `/proc` in which a process sees only itself.
#[derive(Debug, Clone, Default)]
pub struct Contents {
    /// Files, read-only and under their own names.
    pub files: Vec<PathBuf>,
    /// Files, read-only and directly below the root under these names.
    pub renamed: Vec<(PathBuf, &'static str)>,
    /// Devices like these, below `/dev` as they are there.
    pub devices: Vec<PathBuf>,
    /// Names directly below the root that files can be [lent](Root::lend) under.
    pub file_names: Vec<&'static str>,
    /// The same for directories.
    pub dir_names: Vec<&'static str>,
}

impl Root {
    /// A root that holds this.
    pub fn make(contents: &Contents) -> Result<Root, Error> {
        in_new_thread(|| {
            let unshared = sys::unshare_own(rustix::thread::UnshareFlags::NEWNS);
            unshared.map_err(at("leave the host's mounts"))?;
            build(contents)?;
            own()
        })
    }
}

/// The root that this thread is in.
fn own() -> Result<Root, Error> {
    let made = File::open("/proc/thread-self/ns/mnt").map_err(at("name the new root"))?;
    Ok(Root(Arc::new(made.into())))
}

/// A thread has its own namespaces, and takes them along when it ends.
fn in_new_thread<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    let thread = std::thread::Builder::new().name("forkd-root".to_owned());
    std::thread::scope(|scope| {
        let thread = thread.spawn_scoped(scope, work);
        match thread.map_err(at("start a thread"))?.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn build(contents: &Contents) -> Result<(), Error> {
    let devices = &contents.devices;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(at("make mounts private"))?;
    let place = place(contents)?;
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let options = c"mode=0755,size=1m";
    let mounted = rustix::mount::mount("forkd-root", place, "tmpfs", safe, Some(options));
    mounted.map_err(at("mount an empty root"))?;
    for file in &contents.files {
        let name = file
            .strip_prefix("/")
            .map_err(|_| file_error("use", file)(io::Error::from(io::ErrorKind::InvalidInput)))?;
        bind(place, file, name, safe)?;
    }
    for (file, name) in &contents.renamed {
        bind(place, file, Path::new(name), safe)?;
    }
    for name in &contents.file_names {
        File::create_new(place.join(name)).map_err(at("keep a name in the new root"))?;
    }
    for name in &contents.dir_names {
        fs::create_dir(place.join(name)).map_err(at("keep a name in the new root"))?;
    }
    if !devices.is_empty() {
        make_devices(&place.join("dev"), devices)?;
    }
    let proc = place.join("proc");
    let safe = safe | MountFlags::NOEXEC;
    fs::create_dir(&proc).map_err(at("make a directory in the new root"))?;
    let own = c"hidepid=invisible,subset=pid";
    rustix::mount::mount("proc", &proc, "proc", safe, Some(own))
        .map_err(at("mount /proc in the new root"))?;
    let flags = MountFlags::RDONLY | MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount_remount(place, flags, c"").map_err(at("make the new root read-only"))?;
    enter(place).map_err(at("change the root"))
}

/// A directory with devices like these that every user may open: those of the host may be for root alone.
fn make_devices(dir: &Path, devices: &[PathBuf]) -> Result<(), Error> {
    fs::create_dir(dir).map_err(at("make a directory in the new root"))?;
    let safe = MountFlags::NOSUID | MountFlags::NOEXEC;
    let options = c"mode=0755,size=1m";
    let mounted = rustix::mount::mount("forkd-dev", dir, "tmpfs", safe, Some(options));
    mounted.map_err(at("mount a directory of devices"))?;
    for device in devices {
        let failed = || file_error("make the device", device);
        let like = fs::metadata(device).map_err(failed())?;
        let name = device.strip_prefix("/dev");
        let path = dir.join(name.map_err(|_| failed()(io::ErrorKind::InvalidInput.into()))?);
        if let Some(parent) = path.parent() {
            let mut builder = DirBuilder::new();
            let made = builder.recursive(true).mode(0o755).create(parent);
            made.map_err(failed())?;
        }
        let kind = rustix::fs::FileType::from_raw_mode(like.mode());
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let made = rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, like.rdev());
        made.map_err(|errno| failed()(errno.into()))?;
        // Whatever this process's mask takes away.
        let opened = fs::set_permissions(&path, fs::Permissions::from_mode(0o666));
        opened.map_err(failed())?;
    }
    let flags = safe | MountFlags::RDONLY | MountFlags::BIND;
    rustix::mount::mount_remount(dir, flags, c"").map_err(at("make devices read-only"))
}

/// The same directory twice: the old root ends up on top of the new one, and is detached.
fn enter(place: &Path) -> io::Result<()> {
    rustix::process::chdir(place)?;
    match rustix::process::pivot_root(".", ".") {
        Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH)?,
        // The root is an initial RAM disk, which cannot be left: lay the new one over it.
        Err(rustix::io::Errno::INVAL) => {
            rustix::mount::mount_move(".", "/")?;
            rustix::process::chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::process::chdir("/")?)
}

fn place(contents: &Contents) -> Result<&'static Path, Error> {
    let renamed = contents.renamed.iter().map(|(file, _)| file);
    let files = contents.files.iter().chain(renamed);
    let files = files.chain(&contents.devices);
    let hides = |place: &Path| files.clone().any(|f| f.starts_with(place));
    let mut places = PLACES.iter().map(Path::new);
    let found = places.find(|place| place.is_dir() && !hides(place));
    found.ok_or_else(|| at("find a place for an empty root")(io::ErrorKind::NotFound))
}

fn bind(place: &Path, file: &Path, name: &Path, flags: MountFlags) -> Result<(), Error> {
    let failed = |step| file_error(step, file);
    let target = place.join(name);
    if let Some(parent) = target.parent() {
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o755).create(parent);
        made.map_err(failed("make room for"))?;
    }
    match File::create_new(&target) {
        // Two names of one file, such as a library and the link to it, are both wanted; one twice is not.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made.map_err(failed("make room for"))?,
    };
    let bound = rustix::mount::mount_bind(file, &target);
    bound.map_err(|e| failed("bind")(e.into()))?;
    let flags = flags | MountFlags::RDONLY | MountFlags::BIND;
    let locked = rustix::mount::mount_remount(&target, flags, c"");
    locked.map_err(|e| failed("make read-only")(e.into()))
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Namespace {
        step,
        source: error.into(),
    }
}

fn file_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { step, path, source }
}

/// A program or library, its loader and the libraries it is linked to, as absolute paths. Blocks.
pub fn with_libraries(file: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut needed = vec![file.to_owned()];
    let Some(loader) = interpreter(file).map_err(file_error("read", file))? else {
        return Ok(needed);
    };
    needed.extend(listed(&loader, file)?);
    needed.push(loader);
    Ok(needed)
}

/// What this loader would load for this program or library. Blocks.
pub fn listed(loader: &Path, file: &Path) -> Result<Vec<PathBuf>, Error> {
    let output = Command::new(loader).arg("--list").arg(file).output();
    let output = output.map_err(file_error("run the loader of", file))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(file_error("list the libraries of", file)(io::Error::other(
            said,
        )));
    }
    Ok(parse_list(&String::from_utf8_lossy(&output.stdout)))
}

/// Lines such as `libc.so.6 => /lib/libc.so.6 (0x7f…)` or `/lib64/ld.so (0x7f…)`.
fn parse_list(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let line = line.rsplit_once("=>").map_or(line, |(_, path)| path);
        let path = line.rsplit_once(" (0x")?.0.trim();
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    text.lines().filter_map(path).collect()
}

/// The loader that an ELF file names; `None` if it needs none.
pub fn interpreter(file: &Path) -> io::Result<Option<PathBuf>> {
    let mut head = Vec::new();
    io::Read::read_to_end(
        &mut io::Read::take(File::open(file)?, HEAD as u64),
        &mut head,
    )?;
    let Some((at, len)) = find_interpreter(&head) else {
        return Ok(None);
    };
    let mut name = vec![0; len.min(HEAD)];
    File::open(file)?.read_exact_at(&mut name, at)?;
    name.retain(|byte| *byte != 0);
    let name = String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Some(name.into()))
}

/// Offset and length of the loader's name, from the head of a 64-bit little-endian ELF file.
fn find_interpreter(head: &[u8]) -> Option<(u64, usize)> {
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let number = |at: usize, len: usize| -> Option<u64> {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(head.get(at..at + len)?);
        Some(u64::from_le_bytes(bytes))
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    (0..count).find_map(|index| {
        let at = usize::try_from(table.checked_add(index * size)?).ok()?;
        (number(at, 4)? == u64::from(INTERPRETER))
            .then(|| Some((number(at + 8, 8)?, number(at + 32, 8)? as usize)))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_needs_is_found() {
        let shell = fs::canonicalize("/bin/sh").unwrap();
        let needed = with_libraries(&shell).unwrap();
        assert_eq!(needed[0], shell);
        assert!(needed.iter().all(|path| path.is_file()), "{needed:?}");
        let has = |part: &str| needed.iter().any(|p| p.to_string_lossy().contains(part));
        assert!(has("libc.") && has("ld-"), "{needed:?}");
        let text = tempfile::NamedTempFile::new().unwrap();
        fs::write(text.path(), "#!/bin/sh\n").unwrap();
        assert_eq!(interpreter(text.path()).unwrap(), None);
        with_libraries(Path::new("/no/such/program")).unwrap_err();
    }

    #[test]
    fn a_list_of_libraries_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\nlibgone.so => not found\n";
        let expected = ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_list(text), expected);
    }
}
