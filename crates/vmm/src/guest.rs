//! The built-in test guest: a few dozen bytes of machine code and the device it talks to.
//!
//! It exists so that forking, isolation, layers and branching can be tested and measured on any
//! machine that opens /dev/kvm, without a kernel image. It takes commands from a port, works on guest
//! memory and reports 32-bit values:
//!
//! ```text
//!   port 0x510  in   wait for a command: its number (0: nothing, ask again)
//!        0x514  in   argument 0     0x518  in  argument 1     0x51c  in  argument 2
//!        0x520  in   is a command waiting?
//!        0x524  out  report a value
//! ```
//!
//! With disks, a network card or sockets it has the devices of a Linux guest beside its own: whoever gives
//! it commands is their driver.

mod code;
mod device;
mod more;

pub use code::{COUNTER, LOAD_ADDRESS, program};
pub use device::{Mailbox, TestDevice};
pub use more::{SECOND_COUNTER, SECOND_PAGE, second_program};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::kvm::{Error, failed};

/// First port of the device.
pub const PORT: u64 = 0x510;
/// Ports it takes.
pub const PORTS: u64 = 0x18;

/// Write `args[2] + i` to the first four bytes of page `args[0] + i`, for `args[1]` pages; report 0.
pub const FILL: u32 = 1;
/// Report a sum, sensitive to order, of the first four bytes of `args[1]` pages from page `args[0]`.
pub const SUM: u32 = 2;
/// Count in memory at [`COUNTER`] until the next command.
pub const COUNT: u32 = 3;
/// Halt the CPU for good.
pub const HALT: u32 = 4;
/// Report the four bytes at address `args[0]`.
pub const READ: u32 = 5;
/// Crash the CPU (triple fault).
pub const CRASH: u32 = 6;
/// Write `args[1]` to the four bytes at address `args[0]`; report 0.
pub const WRITE: u32 = 7;
/// Report the time-stamp counter without its lowest 16 bits.
pub const TSC: u32 = 8;
/// Have the kvmclock written to the address `args[0]`, which has its lowest bit set; report 0.
pub const CLOCK: u32 = 9;
/// Start the CPU with the number `args[0]` at page `args[1]`, below 256, in real mode; report 0.
pub const START: u32 = 10;
/// Write the byte `args[1]` to port `args[0]`; report 0.
pub const OUT: u32 = 11;
/// Report the byte at port `args[0]`.
pub const IN: u32 = 12;
/// Write numbers without sense, seeded by `args[2]`, to `args[1]` words from address `args[0]`; report 0.
pub const GARBAGE: u32 = 13;
/// Write such numbers, bytes and words, to `args[1]` ports from port `args[0]`; report 0.
pub const GARBAGE_PORTS: u32 = 14;
/// Not for the guest: the vCPU thread makes a system call that its filter forbids.
pub const FORBIDDEN: u32 = 100;

/// Reported once by every machine when its guest first executes after a start or a fork.
pub const ALIVE: u64 = 1 << 32;

/// What [`SUM`] reports for pages that hold these values.
pub fn sum(values: impl IntoIterator<Item = u32>) -> u32 {
    values
        .into_iter()
        .fold(0u32, |sum, value| sum.rotate_left(1).wrapping_add(value))
}

/// Sets a vCPU up to run [`program`]: 32-bit protected mode, flat segments, no paging.
pub fn set_up(fd: &VcpuFd) -> Result<(), Error> {
    let mut sregs = fd
        .get_sregs()
        .map_err(failed("read the segment registers"))?;
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    fd.set_sregs(&sregs)
        .map_err(failed("set the segment registers"))?;
    let regs = kvm_regs {
        rip: LOAD_ADDRESS,
        rflags: 2,
        rsp: 0x8000,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(failed("set the registers"))
}

#[cfg(test)]
mod tests;
