//! How much memory the groups that a process lives in still let it take.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that processes in this group may still take, bytes: the least that it and the groups above it leave, as far
/// up as can be seen. `None` where none of them limits it.
pub fn memory_headroom(group: &Path) -> Option<u64> {
    group
        .ancestors()
        .take_while(|above| above.join("cgroup.controllers").exists())
        .filter_map(of_one)
        .min()
}

fn of_one(group: &Path) -> Option<u64> {
    let read = |file: &str| fs::read_to_string(group.join(file)).ok();
    headroom(
        &read("memory.max")?,
        &read("memory.current")?,
        &read("memory.stat")?,
    )
}

/// Pages of files that nobody has used for a while are as good as free: the kernel drops them first.
fn headroom(max: &str, current: &str, stat: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let in_use = current.saturating_sub(super::field(stat, "inactive_file"));
    Some(max.saturating_sub(in_use))
}

/// The group that this process is in, if it lies below the mount.
pub fn own_group() -> Option<PathBuf> {
    let path = own_path(&fs::read_to_string("/proc/self/cgroup").ok()?)?;
    Some(super::mount_point()?.join(path))
}

/// `0::/path`: cgroups(7). A group outside of the namespace's root begins with `/..`.
fn own_path(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let outside = Path::new(path)
        .components()
        .any(|part| part.as_os_str() == "..");
    (!outside).then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_leaves_what_is_not_in_use() {
        let stat = "anon 500\nfile 300\ninactive_file 200\nactive_file 100\n";
        assert_eq!(headroom("1000\n", "700\n", stat), Some(500));
        assert_eq!(headroom("1000\n", "5000\n", stat), Some(0));
        assert_eq!(headroom("max\n", "700\n", stat), None);
        assert_eq!(headroom("1000\n", "", stat), None);
    }

    #[test]
    fn the_least_of_all_groups_above_counts() {
        let root = tempfile::tempdir().unwrap();
        let group = |path: &str, max: &str, current: &str| {
            let dir = root.path().join(path);
            fs::create_dir_all(&dir).unwrap();
            for (file, text) in [
                ("cgroup.controllers", "memory"),
                ("memory.max", max),
                ("memory.current", current),
                ("memory.stat", "inactive_file 0\n"),
            ] {
                fs::write(dir.join(file), text).unwrap();
            }
            dir
        };
        let outer = group("pod", "1000", "900");
        let inner = group("pod/node", "max", "900");
        let leaf = group("pod/node/sb", "500", "1");
        assert_eq!(memory_headroom(&inner), Some(100));
        assert_eq!(memory_headroom(&leaf), Some(100));
        assert_eq!(memory_headroom(&outer), Some(100));
        // What is above the mount is not looked at.
        assert_eq!(memory_headroom(root.path()), None);
    }

    #[test]
    fn finds_the_group_of_a_process() {
        let hybrid = "4:memory:/old\n0::/system.slice/forkd.service\n";
        assert_eq!(own_path(hybrid), Some("system.slice/forkd.service".into()));
        assert_eq!(own_path("0::/\n"), Some("".into()));
        assert_eq!(own_path("0::/../elsewhere\n"), None);
        assert_eq!(own_path("4:memory:/old\n"), None);
    }
}
