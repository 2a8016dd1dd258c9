//! PID 1: makes a guest out of what the kernel has started.
//!
//! ```text
//!   initramfs          /init (us), /modules/*.ko, /modules/load.list
//!   /dev/vda           the image's root, read-only
//!   tmpfs              what the guest writes, in its RAM, so that a snapshot has it exactly
//!   overlay            the two together: the guest's root
//! ```
//!
//! Then the initramfs is emptied, its memory freed, and the agent serves. Whatever fails on the way is
//! one line on the console and the end of the machine: the host sees at once that it is gone.

use std::convert::Infallible;
use std::io;

use crate::{console, run, sys};

mod modules;
mod root;

/// What keeps the guest from coming up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {step} {path}")]
    Step {
        step: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "there is no root disk: {device} did not appear within {seconds} s; give the VM a virtio disk \
         and the initramfs the module virtio_blk"
    )]
    NoDisk { device: String, seconds: u64 },
    #[error(
        "{device} holds none of the file systems erofs, squashfs, ext4 that this kernel knows ({why})"
    )]
    FileSystem { device: String, why: String },
    #[error(
        "this is PID 1 of something else than a forkd initramfs, such as a container; run \
         `forkd-agent serve` there"
    )]
    NotInitramfs,
    #[error("cannot serve")]
    Serve(#[source] run::Error),
}

impl Error {
    fn step<E: Into<io::Error>>(step: &'static str, path: &str) -> impl FnOnce(E) -> Self {
        move |error| Self::Step {
            step,
            path: path.to_owned(),
            source: error.into(),
        }
    }
}

/// Whether this process is the guest's init.
pub(crate) fn is_init() -> bool {
    std::process::id() == 1
}

/// Boots the guest and serves until it is asked to end; then the machine is off.
pub(crate) fn run() -> Result<Infallible, Error> {
    // What follows empties the root it finds.
    if !root::is_initramfs() {
        return Err(Error::NotInitramfs);
    }
    root::mount_kernel_views()?;
    let options = Options::read();
    modules::load()?;
    root::mount_root(&options.root)?;
    root::leave_initramfs()?;
    prepare_system();
    run::guest().map_err(Error::Serve)?;
    power_off();
    loop {
        // The machine is going down.
        std::thread::park();
    }
}

/// What the kernel's command line says to us.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    /// `forkd.root=`: the root disk.
    root: String,
    /// `forkd.off=restart`: the machine has no power button, and ends when it is reset.
    off_by_restart: bool,
}

impl Options {
    fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(cmdline: &str) -> Self {
        let find = |name: &str| {
            cmdline
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name))
        };
        Self {
            root: find("forkd.root=").unwrap_or("/dev/vda").to_owned(),
            off_by_restart: find("forkd.off=") == Some("restart"),
        }
    }
}

/// What programs expect of a system, where its absence is no reason to give up.
fn prepare_system() {
    let _ = rustix::system::sethostname(b"forkd");
    if let Err(error) = sys::set_link("lo", true) {
        console(&format!("cannot switch on the loopback device: {error}"));
    }
    let limit = rustix::process::Rlimit {
        current: Some(65_536),
        maximum: Some(1_048_576),
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    for (path, text) in [
        (
            "/etc/hosts",
            "127.0.0.1\tlocalhost forkd\n::1\tlocalhost ip6-localhost ip6-loopback\n",
        ),
        ("/etc/hostname", "forkd\n"),
    ] {
        if !std::path::Path::new(path).exists() {
            let _ = std::fs::create_dir_all("/etc");
            let _ = std::fs::write(path, text);
        }
    }
}

/// Switches the machine off. Returns only where that is not possible.
pub(crate) fn power_off() {
    use rustix::system::{RebootCommand, reboot};
    if !is_init() {
        return;
    }
    rustix::fs::sync();
    // Without a power button, Linux would not come back from this: it halts.
    if !Options::read().off_by_restart {
        let _ = reboot(RebootCommand::PowerOff);
    }
    // Machines without a power button end by a restart that the host does not allow.
    let _ = reboot(RebootCommand::Restart);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_from_the_command_line() {
        assert_eq!(Options::parse("quiet console=ttyS0\n").root, "/dev/vda");
        assert_eq!(Options::parse("forkd.root=/dev/vdb quiet").root, "/dev/vdb");
        assert!(!Options::parse("forkd.off=button quiet").off_by_restart);
        assert!(Options::parse("quiet forkd.off=restart\n").off_by_restart);
    }
}
