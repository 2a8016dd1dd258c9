//! Reading out and putting back what belongs to the VM rather than to a vCPU.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::VmState;
use crate::kvm::{Error, failed};

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

impl VmState {
    /// Reads the interrupt chip and the clock; all vCPUs stand still.
    pub fn capture(vm: &VmFd) -> Result<VmState, Error> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, id) in irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip)
                .map_err(failed("read the interrupt chip"))?;
        }
        let mut clock = vm.get_clock().map_err(failed("read the kvmclock"))?;
        // The flags say how the host measured; only the time itself goes on elsewhere.
        clock.flags = 0;
        Ok(VmState { clock, irqchips })
    }

    /// Puts the interrupt chip back. Before the vCPUs run.
    pub fn restore_irqchip(&self, vm: &VmFd) -> Result<(), Error> {
        let restore = |chip| {
            vm.set_irqchip(chip)
                .map_err(failed("restore the interrupt chip"))
        };
        self.irqchips.iter().try_for_each(restore)
    }

    /// Lets guest time go on from where it stood. After the vCPUs have their TSCs, as the last thing
    /// before they run, so that no time passes for the guest in between.
    pub fn restore_clock(&self, vm: &VmFd) -> Result<(), Error> {
        vm.set_clock(&self.clock)
            .map_err(failed("restore the kvmclock"))
    }
}
