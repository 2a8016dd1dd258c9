//! The monitor's command line. No I/O.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::Path;

use crate::MachineSpec;

/// Every guest has a stream device of its own, so they may all have the same address.
const CID: u32 = 3;
/// Every guest has a network of its own, so they may all have the same address.
const MAC: &str = "02:f0:4b:00:00:01";

/// Descriptors that the process inherits, by number.
#[derive(Debug, Clone, Copy)]
pub(super) struct BootFds {
    pub(super) control: RawFd,
    pub(super) vsock: RawFd,
    pub(super) console: RawFd,
    pub(super) rendezvous: Option<RawFd>,
    pub(super) tap: Option<RawFd>,
}

/// Boots a machine, in a jail or, to find faults, without.
pub(super) fn boot(machine: &MachineSpec, fds: BootFds, jail: bool) -> Vec<OsString> {
    let mut args = Args::new("boot", jail);
    args.pair("--control-fd", fds.control.to_string());
    if let Some(fd) = fds.rendezvous {
        args.pair("--rendezvous-fd", fd.to_string());
    }
    args.pair("--memory", machine.memory_mib.to_string());
    args.pair("--vcpus", machine.vcpus.to_string());
    args.pair("--kernel", &machine.kernel);
    args.pair("--initramfs", &machine.initramfs);
    args.pair("--disk", &machine.rootfs);
    args.pair("--cmdline", kernel_command_line(machine));
    args.pair("--cid", CID.to_string());
    args.pair("--vsock-fd", fds.vsock.to_string());
    args.pair("--console-fd", fds.console.to_string());
    if machine.network {
        args.pair("--mac", MAC);
        if let Some(fd) = fds.tap {
            args.pair("--tap-fd", fd.to_string());
        }
    }
    args.0
}

/// Serves forks of a snapshot, in a jail or without. `layers` are memory and index, the base first.
pub(super) fn template(
    id: &str,
    machine: &MachineSpec,
    state: &Path,
    layers: &[(&Path, &Path)],
    control: RawFd,
    jail: bool,
) -> Vec<OsString> {
    let mut args = Args::new("template", jail);
    args.pair("--control-fd", control.to_string());
    args.pair("--id", id);
    args.pair("--state", state);
    for (memory, index) in layers {
        let mut pair = memory.as_os_str().to_owned();
        pair.push(",");
        pair.push(index);
        args.pair("--layer", pair);
    }
    if !machine.rootfs.as_os_str().is_empty() {
        args.pair("--disk", &machine.rootfs);
    }
    args.0
}

fn kernel_command_line(machine: &MachineSpec) -> String {
    // A panic resets the machine at once, which ends the VM: nobody waits for a guest that is gone.
    let mut line = "console=ttyS0 quiet panic=-1 reboot=k random.trust_cpu=on 8250.nr_uarts=1 \
                    rcupdate.rcu_expedited=1"
        .to_owned();
    if !machine.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&machine.cmdline);
    }
    line
}

struct Args(Vec<OsString>);

impl Args {
    fn new(command: &str, jail: bool) -> Args {
        let mut args = Args(vec![command.into()]);
        if !jail {
            args.0.extend(["--no-jail".into(), "--no-seccomp".into()]);
        }
        args
    }

    fn pair(&mut self, key: &str, value: impl Into<OsString>) {
        self.0.extend([key.into(), value.into()]);
    }
}
