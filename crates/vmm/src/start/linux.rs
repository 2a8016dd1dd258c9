//! A stock Linux kernel: loaded, described to itself, and its vCPUs set up.

use std::fs::File;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_bindings::Msrs;
use kvm_ioctls::VcpuFd;

use super::{Error, Size, open, open_disks, resources};
use crate::boot::{self, Entry, cpu};
use crate::controller::Controller;
use crate::devices::set::Plan;
use crate::host::Host;
use crate::kvm::{self, failed};
use crate::machine::Machine;
use crate::machine::devices::{self, Devices};
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
        let entry = self.load(memory, &plan, size.vcpus as u8)?;
        let fds = [self.tap_fd, self.vsock_fd, self.console_fd];
        let resources = resources(controller, &disks, fds)?;
        let devices = |vm: &_, exit: &_| match resources {
            Some(resources) => Devices::linux(plan, resources, vm, memory, exit),
            None => Err(devices::Error::Unknown("controller".to_owned())),
        };
        let set_up =
            |number, fd: &VcpuFd| set_up(host, memory, size.vcpus as u8, entry, number, fd);
        let machine = Machine::fresh(host, memory, size.vcpus as usize, devices, set_up)?;
        Ok((machine, disks))
    }

    fn load(&self, memory: &Memory, plan: &Plan, vcpus: u8) -> Result<Entry, Error> {
        let mut kernel = open(&self.kernel)?;
        let mut initramfs = self.initramfs.as_ref().map(|path| open(path)).transpose()?;
        let source = boot::Source {
            kernel: &mut kernel,
            initramfs: initramfs.as_mut(),
            command_line: &self.command_line,
        };
        Ok(boot::load(memory.guest(), source, &plan.machine(vcpus))?)
    }
}

fn set_up(
    host: &Host,
    memory: &Memory,
    vcpus: u8,
    entry: Entry,
    number: usize,
    fd: &VcpuFd,
) -> Result<(), kvm::Error> {
    let cpuid = cpu::cpuid(&host.cpuid(), number as u8, vcpus);
    fd.set_cpuid2(&cpuid).map_err(failed("set the CPUID"))?;
    let entries = cpu::msrs();
    if let Ok(msrs) = Msrs::from_entries(&entries) {
        let written = fd.set_msrs(&msrs).map_err(failed("set the MSRs"))?;
        if let Some(refused) = entries.get(written) {
            return Err(kvm::Error::Msr {
                index: refused.index,
                value: refused.data,
            });
        }
    }
    // The others wait for the guest to start them.
    if number != 0 {
        return Ok(());
    }
    let sregs = fd
        .get_sregs()
        .map_err(failed("read the segment registers"))?;
    let sregs = cpu::special_registers(memory.guest(), sregs).map_err(|e| kvm::Error::Call {
        step: "load the first page tables",
        source: std::io::Error::other(e),
    })?;
    fd.set_sregs(&sregs)
        .map_err(failed("set the segment registers"))?;
    fd.set_fpu(&cpu::fpu())
        .map_err(failed("set the floating point state"))?;
    fd.set_regs(&cpu::registers(entry))
        .map_err(failed("set the registers"))
}
