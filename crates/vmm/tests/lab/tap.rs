//! A tap device for a guest, made with the node's own tools.

#![allow(unsafe_code, reason = "one ioctl, which no safe crate in use offers")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;

use rustix::ioctl::{self, Updater, opcode};

const SET_INTERFACE: ioctl::Opcode = opcode::write::<libc::c_int>(b'T', 202);
const TAP_NO_PI_VNET_HDR: i16 = 0x0002 | 0x1000 | 0x4000;

#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    _rest: [u8; 22],
}

/// A tap whose host side has the gateway's address.
pub(crate) struct Tap(File);

impl Tap {
    pub(crate) fn create(name: &str) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        let mut request = Request {
            name: [0; 16],
            flags: TAP_NO_PI_VNET_HDR,
            _rest: [0; 22],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq` of 40 bytes, which `Request` is.
        unsafe {
            ioctl::ioctl(
                file.as_fd(),
                Updater::<SET_INTERFACE, Request>::new(&mut request),
            )
        }
        .unwrap();
        for words in [
            ["addr", "add", "10.42.0.1/30", "dev", name].as_slice(),
            ["link", "set", name, "up"].as_slice(),
        ] {
            assert!(Command::new("ip").args(words).status().unwrap().success());
        }
        Self(file)
    }

    pub(crate) fn fd(&self) -> OwnedFd {
        self.0.try_clone().unwrap().into()
    }
}
