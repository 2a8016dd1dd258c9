//! System calls as an attacker makes them.
#![allow(unsafe_code, reason = "an attacker asks the kernel directly")]

use std::io;

/// Makes a system call with these arguments, none of which is a pointer to anything that is written to.
pub(super) fn call(number: i64, arguments: [u64; 3]) -> io::Result<i64> {
    let [a, b, c] = arguments;
    // SAFETY: the callers give no call that writes to this process's memory, and no pointers but null.
    match unsafe { libc::syscall(number, a, b, c) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Maps the first page of a file so that writes reach the file.
pub(super) fn map_shared(file: &std::fs::File) -> io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags};
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the mapping is at an address that the kernel chooses, and is never used.
    unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            MapFlags::SHARED,
            file,
            0,
        )?
    };
    Ok(())
}
