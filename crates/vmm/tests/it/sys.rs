//! System calls as an attacker makes them.
#![allow(unsafe_code, reason = "an attacker asks the kernel directly")]

use std::io;

/// Makes a system call with these arguments, none of which points to anything that is written to.
pub(crate) fn call(number: i64, arguments: [u64; 5]) -> io::Result<i64> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the callers give no call that writes to this process's memory, and pointers only to what
    // lives across the call.
    match unsafe { libc::syscall(number, a, b, c, d, e) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Makes a timer that would signal a thread of another process.
pub(crate) fn timer_for(thread: i32) -> io::Result<()> {
    // SAFETY: sigevent is plain old data, and all zeroes a valid value of it.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = libc::SIGKILL;
    event.sigev_notify_thread_id = thread;
    let mut timer: libc::c_int = -1;
    // SAFETY: both pointers are to live values of the types that the kernel expects.
    let made = unsafe {
        libc::syscall(
            libc::SYS_timer_create,
            libc::CLOCK_MONOTONIC,
            &raw mut event,
            &raw mut timer,
        )
    };
    match made {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
