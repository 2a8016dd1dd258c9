//! Mounts: the kernel's views, the image, the overlay over it; and the move into it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};

use super::Error;

/// How long the root disk may take to appear.
const DISK_LIMIT: Duration = Duration::from_secs(10);
const DISK_STEP: Duration = Duration::from_millis(2);
/// The file systems an image may have.
const FILE_SYSTEMS: [&str; 3] = ["erofs", "squashfs", "ext4"];

const LOWER: &str = "/forkd/lower";
const WRITABLE: &str = "/forkd/rw";
const ROOT: &str = "/forkd/root";
/// What moves from the initramfs into the root, parents first.
const MOVED: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

const SAFE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

fn mount_at(kind: &str, at: &str, flags: MountFlags, options: &str) -> Result<(), Error> {
    std::fs::create_dir_all(at).map_err(Error::step("make", at))?;
    let options = std::ffi::CString::new(options).unwrap_or_default();
    mount(kind, at, kind, flags, Some(options.as_c_str())).map_err(Error::step("mount", at))
}

/// Whether the root is one that the kernel unpacked into memory.
pub(super) fn is_initramfs() -> bool {
    const RAMFS: i64 = 0x8584_58f6;
    const TMPFS: i64 = 0x0102_1994;
    rustix::fs::statfs("/").is_ok_and(|found| [RAMFS, TMPFS].contains(&found.f_type))
}

/// Mounts /proc, /sys, /dev, /run and what belongs below them, and connects us to the console.
pub(super) fn mount_kernel_views() -> Result<(), Error> {
    mount_at("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755")?;
    open_console();
    mount_at("proc", "/proc", SAFE, "")?;
    mount_at("sysfs", "/sys", SAFE, "")?;
    mount_at(
        "tmpfs",
        "/run",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=0755",
    )?;
    mount_at(
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID,
        "mode=0620,gid=5,ptmxmode=0666",
    )?;
    mount_at(
        "tmpfs",
        "/dev/shm",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=1777",
    )?;
    // A kernel without cgroups is a poorer guest, and still one.
    let _ = mount_at("cgroup2", "/sys/fs/cgroup", SAFE, "");
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, link);
    }
    Ok(())
}

/// The kernel could not give us a console where the initramfs has no device file for it. The first
/// three descriptors must be taken all the same.
fn open_console() {
    let open = |path| OpenOptions::new().read(true).write(true).open(path);
    let Ok(console) = open("/dev/console").or_else(|_| open("/dev/null")) else {
        return;
    };
    if console.as_raw_fd() <= 2 {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
        if console.as_raw_fd() <= 2 {
            std::mem::forget(console);
        }
    }
}

/// Mounts the image on `device` and the overlay over it.
pub(super) fn mount_root(device: &str) -> Result<(), Error> {
    wait_for(device)?;
    mount_image(device)?;
    mount_at("tmpfs", WRITABLE, MountFlags::empty(), "mode=0755,size=90%")?;
    let (upper, work) = (format!("{WRITABLE}/upper"), format!("{WRITABLE}/work"));
    for dir in [&upper, &work] {
        std::fs::create_dir(dir).map_err(Error::step("make", dir))?;
    }
    let options = format!("lowerdir={LOWER},upperdir={upper},workdir={work}");
    mount_at("overlay", ROOT, MountFlags::empty(), &options)
}

fn wait_for(device: &str) -> Result<(), Error> {
    let started = Instant::now();
    while !Path::new(device).exists() {
        if started.elapsed() > DISK_LIMIT {
            let seconds = DISK_LIMIT.as_secs();
            return Err(Error::NoDisk {
                device: device.to_owned(),
                seconds,
            });
        }
        std::thread::sleep(DISK_STEP);
    }
    Ok(())
}

fn mount_image(device: &str) -> Result<(), Error> {
    std::fs::create_dir_all(LOWER).map_err(Error::step("make", LOWER))?;
    let mut why = Vec::new();
    for kind in FILE_SYSTEMS {
        match mount(device, LOWER, kind, MountFlags::RDONLY, None) {
            Ok(()) => return Ok(()),
            Err(error) => why.push(format!("{kind}: {}", io::Error::from(error))),
        }
    }
    Err(Error::FileSystem {
        device: device.to_owned(),
        why: why.join(", "),
    })
}

/// Makes the overlay the root of everything, and frees what the initramfs holds.
pub(super) fn leave_initramfs() -> Result<(), Error> {
    for path in MOVED {
        let to = format!("{ROOT}{path}");
        std::fs::create_dir_all(&to).map_err(Error::step("make", &to))?;
        mount_move(path, &to).map_err(Error::step("move", path))?;
    }
    for path in [
        "/modules", "/init", "/bin", "/lib", "/lib64", "/usr", "/etc",
    ] {
        let path = Path::new(path);
        let _ = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir_all(path));
    }
    rustix::process::chdir(ROOT).map_err(Error::step("enter", ROOT))?;
    mount_move(".", "/").map_err(Error::step("move", ROOT))?;
    rustix::process::chroot(".").map_err(Error::step("make the root", ROOT))?;
    rustix::process::chdir("/").map_err(Error::step("enter", "/"))?;
    mount_at(
        "tmpfs",
        "/tmp",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=1777",
    )
}
