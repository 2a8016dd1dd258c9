//! A stock Linux kernel: its files and descriptors opened, and a machine made around it.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::{Error, Size, open, open_disks};
use crate::boot;
use crate::controller::Controller;
use crate::devices::set::Plan;
use crate::host::Host;
use crate::machine::devices::Resources;
use crate::machine::{self, Machine};
use crate::memory::Memory;
use crate::sys;

/// The devices of a booted machine and the host's ends of them.
#[derive(Debug, Clone, Default)]
pub struct Peripherals {
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

impl Peripherals {
    /// The numbers of the inherited descriptors.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        let all = [self.tap_fd, self.vsock_fd, self.console_fd];
        all.into_iter().flatten().collect()
    }

    /// The plan, if any device is named.
    pub(super) fn plan(&self) -> Option<Plan> {
        let plan = Plan {
            disks: vec![true; self.disks.len()],
            mac: self.mac,
            cid: self.cid,
        };
        let named = !plan.disks.is_empty() || plan.mac.is_some() || plan.cid.is_some();
        (named || self.console_fd.is_some()).then_some(plan)
    }

    /// What the devices need of the host: the opened disks, and the descriptors taken over by number.
    pub(super) fn resources(
        &self,
        controller: &Controller,
        disks: &[File],
    ) -> Result<Resources, Error> {
        let take = |number: Option<RawFd>| -> Result<Option<OwnedFd>, Error> {
            let taken =
                number.map(|number| sys::inherited_fd(number).map_err(|e| Error::Fd(number, e)));
            taken.transpose()
        };
        let control = controller.channel().cloned();
        let control = control.expect("a process that boots a machine was given a control socket");
        let disks: Result<_, _> = disks.iter().map(File::try_clone).collect();
        let disks = disks.map_err(machine::Error::Prepare)?;
        Ok(Resources {
            control,
            disks,
            tap: take(self.tap_fd)?,
            vsock: take(self.vsock_fd)?,
            console: take(self.console_fd)?,
        })
    }
}

/// What to boot and with which devices.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// A bzImage or an uncompressed vmlinux.
    pub kernel: PathBuf,
    /// The first root file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
    /// Its devices.
    pub peripherals: Peripherals,
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
        let disks = open_disks(&self.peripherals.disks)?;
        let plan = self.peripherals.plan().unwrap_or_default();
        let resources = self.peripherals.resources(controller, &disks)?;
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
