//! Which engine runs here.

use std::sync::Arc;

use forkd_host::facts::Facts;

use crate::fake::Fake;
use crate::firecracker::{self, Firecracker};
use crate::kvm::Kvm;
use crate::qemu::{self, Accel, Qemu};
use crate::{Engine, Error};

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The best that this host can run.
    Auto,
    /// The built-in monitor.
    Kvm,
    /// QEMU.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// No machines at all, for tests of what stands above.
    Fake,
}

/// How engines run their VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whether every VM is confined to a jail of its own.
    pub jail: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { jail: true }
    }
}

/// As [`select_with`], with what is the default.
pub fn select(choice: Choice) -> Result<Arc<dyn Engine>, Error> {
    select_with(choice, Options::default())
}

/// The engine of this choice. Programs are looked for when they are first needed.
pub fn select_with(choice: Choice, options: Options) -> Result<Arc<dyn Engine>, Error> {
    let qemu = |accel| Arc::new(Qemu::new(qemu::PROGRAM, accel).with_jail(options.jail));
    match choice {
        Choice::Auto => match accel(&Facts::collect()) {
            Accel::Kvm => Ok(Arc::new(Kvm::new().with_jail(options.jail))),
            Accel::Tcg => Ok(qemu(Accel::Tcg)),
        },
        Choice::Qemu => Ok(qemu(accel(&Facts::collect()))),
        Choice::Kvm => Ok(Arc::new(Kvm::new().with_jail(options.jail))),
        Choice::Fake => Ok(Arc::new(Fake::default())),
        Choice::Firecracker => {
            let engine = Firecracker::new(firecracker::PROGRAM).with_jail(options.jail);
            Ok(Arc::new(engine))
        }
    }
}

/// A KVM without vmx or svm behind it interprets a stock kernel instruction by instruction, slower than QEMU's
/// own translation does.
fn accel(facts: &Facts) -> Accel {
    if facts.kvm.is_usable() && facts.cpu.virtualization.is_some() {
        Accel::Kvm
    } else {
        Accel::Tcg
    }
}

#[cfg(test)]
mod tests {
    use forkd_host::facts::{Device, Virtualization};

    use super::*;

    #[test]
    fn hardware_is_used_where_cpu_and_device_are_there() {
        let mut facts = Facts::collect();
        for (virtualization, kvm, expected) in [
            (Some(Virtualization::Svm), Device::Usable, Accel::Kvm),
            (Some(Virtualization::Vmx), Device::Denied, Accel::Tcg),
            (None, Device::Usable, Accel::Tcg),
            (None, Device::Absent, Accel::Tcg),
        ] {
            facts.cpu.virtualization = virtualization;
            facts.kvm = kvm;
            assert_eq!(accel(&facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn who_is_named_is_chosen() {
        for (choice, name) in [
            (Choice::Kvm, "kvm"),
            (Choice::Qemu, "qemu"),
            (Choice::Firecracker, "firecracker"),
            (Choice::Fake, "fake"),
        ] {
            assert_eq!(select(choice).unwrap().name(), name);
        }
        assert_ne!(select(Choice::Auto).unwrap().name(), "firecracker");
    }
}
