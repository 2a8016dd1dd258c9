//! The devices of one machine: made, found on the buses, saved and made again.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use forkd_wire::vmm::Exit;
use kvm_ioctls::VmFd;

use crate::bus::{self, Bus, IrqLine, Range};
use crate::control::Channel;
use crate::devices::power::{PowerEvent, PowerSink};
use crate::devices::set::{self, Handles, Plan, Set, Wiring};
use crate::exit::ExitEvent;
use crate::guest::{self, Mailbox, TestDevice};
use crate::kvm::KvmIrq;
use crate::memory::Memory;
use crate::vcpu::Wakeup;

/// The name of the test guest's device in a description.
const TEST: &str = "test";

/// Why a device could not be made or saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device of a Linux guest.
    #[error(transparent)]
    Set(#[from] set::Error),
    /// Two devices in one place.
    #[error("cannot place device {device} on the bus")]
    Place {
        /// Which.
        device: String,
        /// Why.
        #[source]
        source: bus::Error,
    },
}

/// Descriptors and channels given to a machine when it is made.
#[derive(Debug)]
pub struct Resources {
    /// The process's control socket: devices send reports there.
    pub control: Arc<Channel>,
    /// One file for each disk of the machine.
    pub disks: Vec<File>,
    /// The network device's tap.
    pub tap: Option<OwnedFd>,
    /// Listening stream socket whose connections become streams to the guest.
    pub vsock: Option<OwnedFd>,
    /// Where the serial console writes.
    pub console: Option<OwnedFd>,
}

/// The devices, made for one VM.
#[derive(Debug, Default)]
pub struct Devices {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    mailbox: Option<Arc<Mailbox>>,
    set: Option<Arc<Set>>,
}

impl PowerSink for ExitEvent {
    fn ended(&self, event: PowerEvent) {
        let exit = match event {
            PowerEvent::Off => Exit::PowerOff,
            PowerEvent::Reset => Exit::Reset,
        };
        self.end(exit, String::new());
    }
}

impl Devices {
    /// The device of the test guest alone.
    pub fn test(control: Arc<Channel>) -> Result<Devices, Error> {
        Devices::placed(None, Some(control))
    }

    /// The device of the test guest beside those of a Linux guest.
    pub fn test_with(
        plan: Plan,
        resources: Resources,
        vm: &Arc<VmFd>,
        memory: &Arc<Memory>,
        exit: &ExitEvent,
    ) -> Result<Devices, Error> {
        let control = resources.control.clone();
        let set = Set::new(plan, handles(resources), &wiring(&line(vm), memory, exit))?;
        Devices::placed(Some(set), Some(control))
    }

    /// The devices of a Linux guest that has never run.
    pub fn linux(
        plan: Plan,
        resources: Resources,
        vm: &Arc<VmFd>,
        memory: &Arc<Memory>,
        exit: &ExitEvent,
    ) -> Result<Devices, Error> {
        let set = Set::new(plan, handles(resources), &wiring(&line(vm), memory, exit))?;
        Devices::placed(Some(set), None)
    }

    /// Makes the devices of a frozen machine again.
    pub fn restore(
        saved: &BTreeMap<String, serde_json::Value>,
        resources: Resources,
        vm: &Arc<VmFd>,
        memory: &Arc<Memory>,
        exit: &ExitEvent,
    ) -> Result<Devices, Error> {
        let test = saved.contains_key(TEST).then(|| resources.control.clone());
        if saved.len() == usize::from(test.is_some()) {
            return Devices::placed(None, test);
        }
        let set = Set::restore(saved, handles(resources), &wiring(&line(vm), memory, exit))?;
        set.resume()?;
        Devices::placed(Some(set), test)
    }

    fn placed(set: Option<Set>, test: Option<Arc<Channel>>) -> Result<Devices, Error> {
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        if let Some(set) = &set {
            set.place(&mut pio, &mut mmio)?;
        }
        let mailbox = test
            .map(|control| place_test(control, &mut pio))
            .transpose()?;
        Ok(Devices {
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            mailbox,
            set: set.map(Arc::new),
        })
    }

    /// What is kept of each device.
    pub fn save(&self) -> Result<BTreeMap<String, serde_json::Value>, Error> {
        let mut saved = match &self.set {
            Some(set) => set.save()?,
            None => BTreeMap::new(),
        };
        if self.mailbox.is_some() {
            saved.insert(TEST.to_owned(), serde_json::Value::Null);
        }
        Ok(saved)
    }

    /// The devices of a Linux guest, if it is one.
    pub fn set(&self) -> Option<&Set> {
        self.set.as_deref()
    }

    /// Port devices.
    pub fn pio(&self) -> Arc<Bus> {
        self.pio.clone()
    }

    /// Memory-mapped devices.
    pub fn mmio(&self) -> Arc<Bus> {
        self.mmio.clone()
    }

    /// What must be woken before a pause.
    pub fn wakeups(&self) -> Vec<Arc<dyn Wakeup>> {
        self.mailbox
            .iter()
            .map(|mailbox| mailbox.clone() as Arc<dyn Wakeup>)
            .collect()
    }

    /// Where commands for the test guest go, if it is one.
    pub fn mailbox(&self) -> Option<&Arc<Mailbox>> {
        self.mailbox.as_ref()
    }
}

fn place_test(control: Arc<Channel>, pio: &mut Bus) -> Result<Arc<Mailbox>, Error> {
    let mailbox = Arc::new(Mailbox::default());
    let device = TestDevice::new(mailbox.clone(), control);
    let range = Range {
        base: guest::PORT,
        len: guest::PORTS,
    };
    let placed = pio.insert(range, Arc::new(Mutex::new(device)));
    placed.map_err(|source| Error::Place {
        device: TEST.to_owned(),
        source,
    })?;
    Ok(mailbox)
}

fn handles(resources: Resources) -> Handles {
    let Resources {
        disks,
        tap,
        vsock,
        console,
        ..
    } = resources;
    Handles {
        disks,
        tap,
        vsock,
        console,
    }
}

fn line(vm: &Arc<VmFd>) -> impl Fn(u32) -> Arc<dyn IrqLine> + use<> {
    let vm = vm.clone();
    move |gsi| Arc::new(KvmIrq::new(vm.clone(), gsi))
}

fn wiring<'a, I>(irq: &'a I, memory: &Arc<Memory>, exit: &ExitEvent) -> Wiring<'a, I> {
    let memory = Arc::new(memory.guest().clone());
    Wiring {
        memory,
        irq,
        power: Arc::new(exit.clone()),
    }
}
