//! A stock Linux kernel: its files and descriptors opened, and a machine made around it.

use std::fs::File;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Error, Size, open, open_disks, resources};
use crate::boot;
use crate::controller::Controller;
use crate::devices::set::Plan;
use crate::host::Host;
use crate::machine::Machine;
use crate::memory::Memory;

/// What to boot and with which devices.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// A bzImage or an uncompressed vmlinux.
    pub kernel: PathBuf,
    /// The first root file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
    /// Disks, read-only, the first is `vda`.
    pub disks: Vec<PathBuf>,
    /// Hardware address of the network card, if there is one.
    pub mac: Option<[u8; 6]>,
    /// Address of the guest for sockets, if there are any.
    pub cid: Option<u32>,
    /// Inherited tap.
    pub tap_fd: Option<RawFd>,
    /// Inherited listener whose connections become streams to the guest.
    pub vsock_fd: Option<RawFd>,
    /// Inherited sink of the serial console.
    pub console_fd: Option<RawFd>,
}

impl LinuxGuest {
    /// Loads the kernel and builds the machine around it. Answers the machine and its disks.
    pub(super) fn build(
        &self,
        host: &Arc<Host>,
        memory: &Arc<Memory>,
        size: Size,
        controller: &Controller,
    ) -> Result<(Machine, Vec<File>), Error> {
        let disks = open_disks(&self.disks)?;
        let plan = Plan {
            disks: vec![true; disks.len()],
            mac: self.mac,
            cid: self.cid,
        };
        let fds = [self.tap_fd, self.vsock_fd, self.console_fd];
        let resources = resources(controller, &disks, fds)?;
        let mut kernel = open(&self.kernel)?;
        let mut initramfs = self.initramfs.as_ref().map(|path| open(path)).transpose()?;
        let source = boot::Source {
            kernel: &mut kernel,
            initramfs: initramfs.as_mut(),
            command_line: &self.command_line,
        };
        // The number was checked: it fits.
        let cpus = size.vcpus as u8;
        let machine = boot::machine::machine(host, memory, source, cpus, plan, resources)?;
        Ok((machine, disks))
    }
}
