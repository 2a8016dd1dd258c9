//! Processes that use a directory, found without a record of them.
//!
//! Between starting a process and writing down its pid lies an instant in which a crash leaves a process that
//! no record knows. Every such process has a directory of its own, and bears that directory's path or its last
//! component, which is unique, on its command line, or holds a file in it open.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use crate::process::{self, Identity, Process};

/// How long a killed process may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Kills every process of these programs that uses a directory, and waits until they are gone. Answers whom it
/// killed.
pub fn kill_users(dir: &Path, programs: &[&str]) -> Result<Vec<Identity>, process::Error> {
    let mut killed = Vec::new();
    for identity in users(dir, programs) {
        if let Some(process) = Process::adopt(identity)? {
            process.kill()?;
            process.wait_for(GONE_WITHIN)?;
            killed.push(identity);
        }
    }
    Ok(killed)
}

/// Every process of these programs, but for this one, that names the directory or a path in it on its command line
/// or has one open. Whoever merely looks at a file there, with a pager say, runs another program and is left alone.
pub fn users(dir: &Path, programs: &[&str]) -> Vec<Identity> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return vec![];
    };
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let own = std::process::id();
    pids.filter(|pid| *pid != own && runs(*pid, programs) && uses(*pid, dir))
        .filter_map(|pid| process::identity_of(pid).ok().flatten())
        .collect()
}

fn runs(pid: u32, programs: &[&str]) -> bool {
    let Ok(exe) = fs::read_link(format!("/proc/{pid}/exe")) else {
        return false;
    };
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    // An upgrade replaces the file of a program that runs on.
    let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
    programs.iter().any(|program| is_named(name, program))
}

/// Whether a file is that of a program: by its name, or by one that says its version too, as releases of Firecracker
/// do (`firecracker-v1.10.1-x86_64`).
fn is_named(file: &str, program: &str) -> bool {
    let rest = file.strip_prefix(program);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("-v"))
}

fn uses(pid: u32, dir: &Path) -> bool {
    let named = fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| names(&line, dir));
    named || has_open(pid, dir)
}

/// Whether a command line holds the path of the directory, or the directory's own name, as a whole.
fn names(command_line: &[u8], dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default();
    holds(command_line, dir.as_os_str().as_bytes()) || holds(command_line, name.as_bytes())
}

fn holds(line: &[u8], wanted: &[u8]) -> bool {
    let goes_on = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let found = |at: usize| !line.get(at + wanted.len()).is_some_and(goes_on);
    !wanted.is_empty()
        && line
            .windows(wanted.len())
            .enumerate()
            .any(|(at, window)| window == wanted && found(at))
}

fn has_open(pid: u32, dir: &Path) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    fds.flatten()
        .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| is_inside(to.as_os_str(), dir)))
}

fn is_inside(path: &OsStr, dir: &Path) -> bool {
    Path::new(path).starts_with(dir)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_is_matched_by_whole_components() {
        let dir = Path::new("/run/x/sb-1");
        for (line, expected) in [
            (&b"qemu\0-serial\0file:/run/x/sb-1/console\0"[..], true),
            (b"qemu\0path=/run/x/sb-1/agent,server=on\0", true),
            (b"qemu\0/run/x/sb-1\0", true),
            (b"qemu\0-name\0forkd-sb-1\0-m\0", true),
            (b"qemu\0-name\0forkd-sb-1", true),
            (b"qemu\0-name\0forkd-sb-12\0", false),
            (b"qemu\0/run/x/sb-10/console\0", false),
            (b"qemu\0", false),
        ] {
            assert_eq!(
                names(line, dir),
                expected,
                "{:?}",
                String::from_utf8_lossy(line)
            );
        }
    }

    #[test]
    fn a_program_is_known_by_its_releases_too() {
        for (file, expected) in [
            ("firecracker", true),
            ("firecracker-v1.10.1-x86_64", true),
            ("firecracker-containerd", false),
            ("firecrack", false),
            ("a-firecracker", false),
        ] {
            assert_eq!(is_named(file, "firecracker"), expected, "{file}");
        }
    }

    #[test]
    fn finds_and_kills_by_name_and_by_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("console")).unwrap();
        let sleep = || {
            let mut command = Command::new("sleep");
            command.arg("60").stdin(Stdio::null());
            command
        };
        let mut by_file = sleep().stdout(file).spawn().unwrap();
        // Waits in itself: a child of it would bear its command line for an instant.
        let mut by_name = Command::new("sh")
            .args(["-c", "read line"])
            .arg(dir.path().join("x"))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut bystander = sleep().arg("60").current_dir(other.path()).spawn().unwrap();
        assert_eq!(kill_users(dir.path(), &["tail"]).unwrap(), []);
        let shell = fs::canonicalize("/bin/sh").unwrap();
        let programs = ["sleep", shell.file_name().unwrap().to_str().unwrap()];
        let killed = kill_users(dir.path(), &programs).unwrap();
        let mut killed: Vec<u32> = killed.iter().map(|i| i.pid).collect();
        killed.sort_unstable();
        let mut expected = [by_file.id(), by_name.id()];
        expected.sort_unstable();
        assert_eq!(killed, expected);
        for child in [&mut by_file, &mut by_name] {
            assert!(
                process::identity_of(child.id()).unwrap().is_none(),
                "not gone"
            );
            // Reaped above already, so there is nothing left to wait for.
            assert!(child.wait().is_err());
        }
        assert!(
            bystander.try_wait().unwrap().is_none(),
            "a bystander was killed"
        );
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }
}
