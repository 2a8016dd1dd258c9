//! Firecracker's command line, and the kernel's. No I/O.

use std::ffi::OsString;

use super::names::API;
use crate::MachineSpec;

/// The arguments.
pub(super) fn arguments(id: &str) -> Vec<OsString> {
    let name = name_argument(id);
    let args = ["--id", &name, "--api-sock", API, "--level", "Error"];
    args.map(OsString::from).into()
}

/// What names the process to those who look for it. Firecracker takes letters, digits and hyphens.
pub(super) fn name_argument(id: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    format!("forkd-{}", id.chars().map(plain).collect::<String>())
}

/// A panic resets the machine at once, which ends the VM: nobody waits for a guest that is gone. The machine has no
/// power button: the agent ends it by a reset too (`forkd.off=restart`).
pub(super) fn kernel_command_line(machine: &MachineSpec) -> String {
    let mut line =
        "console=ttyS0 quiet panic=-1 reboot=k pci=off random.trust_cpu=on 8250.nr_uarts=1 \
                    rcupdate.rcu_expedited=1 forkd.off=restart"
            .to_owned();
    if !machine.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&machine.cmdline);
    }
    line
}
