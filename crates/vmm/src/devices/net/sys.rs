//! Two ioctls of the tap device.

#![allow(
    unsafe_code,
    reason = "rustix leaves device-specific ioctls to its users"
)]

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{self, IntegerSetter, Setter, opcode};

const SET_OFFLOAD: ioctl::Opcode = opcode::write::<libc::c_uint>(b'T', 208);
const SET_HEADER_LEN: ioctl::Opcode = opcode::write::<libc::c_int>(b'T', 216);

/// Sets the length of the header in front of every frame.
pub(super) fn set_header_len(tap: impl AsFd, len: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int through the pointer and keeps nothing; `Setter` passes
    // a pointer to a live int. On another kind of descriptor the kernel refuses the number.
    Ok(unsafe { ioctl::ioctl(tap, Setter::<SET_HEADER_LEN, libc::c_int>::new(len)) }?)
}

/// Says which unfinished frames the reader of the tap takes (`TUN_F_*` bits).
pub(super) fn set_offload(tap: impl AsFd, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value, as `IntegerSetter` passes it.
    Ok(unsafe { ioctl::ioctl(tap, IntegerSetter::<SET_OFFLOAD>::new_usize(flags as usize)) }?)
}
