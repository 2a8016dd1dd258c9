//! The system calls that std and rustix lack, one safe function each.
#![allow(
    unsafe_code,
    reason = "the only door to calls that the safe wrappers lack"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::thread::UnshareFlags;

/// Steps between fork and exec, to be run in the child. Async-signal-safe: nothing here may allocate,
/// lock or unwind, because the child is a copy of one thread of a process that had many.
pub(crate) trait BeforeExec: Send + Sync + 'static {
    /// Runs the steps; an error ends the child and is reported to the parent.
    fn run(&self) -> io::Result<()>;
}

/// Has `steps` run in the child between fork and exec.
pub(crate) fn before_exec(command: &mut Command, steps: impl BeforeExec) {
    // SAFETY: the closure runs in the forked child, where only async-signal-safe calls are allowed.
    // `BeforeExec` states that duty, and its one implementation, `process::spawn::Steps`, makes
    // nothing but raw system calls through rustix on values computed before the fork.
    unsafe {
        command.pre_exec(move || steps.run());
    }
}

/// A file of the parent, in its forked child, by number.
pub(crate) fn borrow_in_child<'a>(fd: std::os::fd::RawFd) -> std::os::fd::BorrowedFd<'a> {
    // SAFETY: the child has a copy of the parent's open files, made while the parent owned this one
    // (`Spawn` keeps it until after the fork), and it closes none before exec.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

/// The processor's time-stamp counter, now.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and reads no memory. Linux would have to be told to
    // forbid it (PR_SET_TSC), which nothing here does.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Returns unused pages of the heap to the kernel.
pub(crate) fn trim_heap() {
    // SAFETY: malloc_trim(3) is thread-safe and touches only memory that nobody has allocated.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives this thread a network namespace of its own.
pub(crate) fn unshare_network() -> io::Result<()> {
    unshare_own(UnshareFlags::NEWNET)
}

/// Gives this thread, or its next children, namespaces of their own.
pub(crate) fn unshare_own(namespaces: UnshareFlags) -> io::Result<()> {
    if namespaces.contains(UnshareFlags::FILES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: only with CLONE_FILES, refused above, do other threads come to share less than the program was
    // written for; namespaces hold no memory and no file descriptors.
    unsafe { rustix::thread::unshare_unsafe(namespaces)? };
    Ok(())
}

/// `struct ifreq` as TUNSETIFF reads it; linux/if.h.
#[repr(C)]
struct TapRequest {
    name: [u8; 16],
    flags: u16,
    padding: [u8; 22],
}

const TUNSETIFF: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 202);
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Makes this open `/dev/net/tun` the far end of a new tap device.
pub(crate) fn attach_tap(control: &std::fs::File, name: &str) -> io::Result<()> {
    let mut request = TapRequest {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        padding: [0; 22],
    };
    // One byte stays zero: the kernel reads the name as a C string.
    if name.is_empty() || name.len() >= request.name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads a `struct ifreq` of 40 bytes, which `TapRequest` is, and keeps no pointer to it. Its
    // number encodes an int, for historical reasons, but that is only a number.
    unsafe {
        let call = rustix::ioctl::Updater::<TUNSETIFF, TapRequest>::new(&mut request);
        rustix::ioctl::ioctl(control, call)?;
    }
    Ok(())
}

const TUNSETPERSIST: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 203);

/// Lets a tap device stay when its file is closed, or go.
pub(crate) fn keep_tap(tap: impl std::os::fd::AsFd, stays: bool) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument as a number, whatever its own number encodes, and touches no memory.
    unsafe {
        let call = rustix::ioctl::IntegerSetter::<TUNSETPERSIST>::new_usize(usize::from(stays));
        rustix::ioctl::ioctl(tap, call)?;
    }
    Ok(())
}
