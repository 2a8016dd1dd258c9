//! The disk below a file: what limits on input and output are set on.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const DEVICES: &str = "/sys/dev/block";

/// A block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// What the file system that holds a file keeps it on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// One disk, whole: limits cannot be set on partitions. Mapped devices stand for themselves.
    Disk(Device),
    /// Memory: there is no input and output.
    Memory,
    /// Several disks, or none that the kernel names: overlay, btrfs, network file systems.
    Unknown,
}

/// What is below this file or directory. What cannot be looked at is [`Backing::Unknown`].
pub fn backing(path: &Path) -> Backing {
    let Ok(metadata) = fs::metadata(path) else {
        return Backing::Unknown;
    };
    let device = split(metadata.dev());
    if device.major != 0 {
        return whole(Path::new(DEVICES), device).map_or(Backing::Unknown, Backing::Disk);
    }
    // No disk at all, or none with a number of its own.
    let in_memory = rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == TMPFS);
    if in_memory {
        Backing::Memory
    } else {
        Backing::Unknown
    }
}

/// statfs(2).
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

fn split(dev: u64) -> Device {
    Device {
        major: rustix::fs::major(dev),
        minor: rustix::fs::minor(dev),
    }
}

/// The whole disk of a device, which is the device itself unless it is a partition.
fn whole(devices: &Path, device: Device) -> Option<Device> {
    let dir: PathBuf = devices.join(format!("{}:{}", device.major, device.minor));
    if !dir.join("partition").exists() {
        return dir.exists().then_some(device);
    }
    // A partition's directory lies in its disk's.
    let disk = fs::canonicalize(&dir).ok()?;
    parse(&fs::read_to_string(disk.parent()?.join("dev")).ok()?)
}

fn parse(text: &str) -> Option<Device> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(Device {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(major: u32, minor: u32) -> Device {
        Device { major, minor }
    }

    #[test]
    fn a_partition_stands_for_its_disk() {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("sys/block/sda");
        let part = disk.join("sda2");
        let mapped = root.path().join("sys/block/dm-0");
        for (dir, dev) in [(&disk, "8:0\n"), (&part, "8:2\n"), (&mapped, "253:0\n")] {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join("dev"), dev).unwrap();
        }
        fs::write(part.join("partition"), "2\n").unwrap();
        let devices = root.path().join("dev");
        fs::create_dir(&devices).unwrap();
        for (name, dir) in [("8:0", &disk), ("8:2", &part), ("253:0", &mapped)] {
            std::os::unix::fs::symlink(dir, devices.join(name)).unwrap();
        }
        assert_eq!(whole(&devices, device(8, 2)), Some(device(8, 0)));
        assert_eq!(whole(&devices, device(8, 0)), Some(device(8, 0)));
        assert_eq!(whole(&devices, device(253, 0)), Some(device(253, 0)));
        assert_eq!(whole(&devices, device(9, 9)), None);
    }

    #[test]
    fn file_systems_of_this_host() {
        assert_eq!(backing(Path::new("/proc/self")), Backing::Unknown);
        assert_eq!(backing(Path::new("/nowhere")), Backing::Unknown);
        if Path::new("/dev/shm").is_dir() {
            assert_eq!(backing(Path::new("/dev/shm")), Backing::Memory);
        }
        // Whatever is named is a disk that the kernel knows.
        if let Backing::Disk(device) = backing(&std::env::temp_dir()) {
            let dir = Path::new(DEVICES).join(format!("{}:{}", device.major, device.minor));
            assert!(dir.exists() && !dir.join("partition").exists(), "{dir:?}");
        }
    }
}
