//! The system calls that std and rustix lack, one safe function each.
#![allow(
    unsafe_code,
    reason = "the only door to calls that the safe wrappers lack"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

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
