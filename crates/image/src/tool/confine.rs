//! Commands that die with us, and take their descendants and mounts along.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// A command that dies with us and takes its descendants and mounts along.
pub(super) fn confined(program: &Path) -> Command {
    static PREFIX: OnceLock<Vec<OsString>> = OnceLock::new();
    let prefix = PREFIX.get_or_init(|| {
        let unshare = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
        ];
        let probe = dying_with_us()
            .into_iter()
            .chain(unshare.map(OsString::from))
            .chain(["--".into()])
            .collect::<Vec<_>>();
        if works(&probe) {
            probe
        } else {
            dying_with_us()
        }
    });
    prefixed(prefix, program)
}

fn dying_with_us() -> Vec<OsString> {
    static PREFIX: OnceLock<Vec<OsString>> = OnceLock::new();
    let prefix = PREFIX.get_or_init(|| {
        let setpriv: Vec<OsString> = ["setpriv", "--pdeathsig", "KILL", "--"]
            .map(OsString::from)
            .into();
        if works(&setpriv) { setpriv } else { Vec::new() }
    });
    prefix.clone()
}

fn works(prefix: &[OsString]) -> bool {
    prefixed(prefix, Path::new("true"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn prefixed(prefix: &[OsString], program: &Path) -> Command {
    let mut command = match prefix.split_first() {
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
        None => Command::new(program),
    };
    command
        .process_group(0)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut path = if path.is_empty() {
        OsString::from("/usr/bin:/bin")
    } else {
        path
    };
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    command.env("PATH", path);
    command
}

/// A command for a tool that has no descendants and leaves nothing behind.
pub(super) fn alone(program: &Path) -> Command {
    prefixed(&dying_with_us(), program)
}
