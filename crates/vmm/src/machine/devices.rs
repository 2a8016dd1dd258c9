//! The devices of one machine: made, found on the buses, saved and made again.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;

use crate::bus::{self, Bus, Range};
use crate::control::Channel;
use crate::exit::ExitEvent;
use crate::guest::{self, Mailbox, TestDevice};
use crate::memory::Memory;
use crate::vcpu::Wakeup;

/// The name of the test guest's device in a description.
const TEST: &str = "test";

/// Why a device could not be made or saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device of the frozen machine is unknown here.
    #[error("the machine has a device {0:?} that this version of forkd-vmm does not have")]
    Unknown(String),
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
}

impl Devices {
    /// The device of the test guest alone.
    pub fn test(control: Arc<Channel>) -> Result<Devices, Error> {
        let mailbox = Arc::new(Mailbox::default());
        let device = TestDevice::new(mailbox.clone(), control);
        let mut pio = Bus::default();
        let range = Range { base: guest::PORT, len: guest::PORTS };
        let placed = pio.insert(range, Arc::new(Mutex::new(device)));
        placed.map_err(|source| Error::Place { device: TEST.to_owned(), source })?;
        Ok(Devices { pio: Arc::new(pio), mmio: Arc::default(), mailbox: Some(mailbox) })
    }

    /// Makes the devices of a frozen machine again.
    pub fn restore(
        saved: &BTreeMap<String, serde_json::Value>,
        resources: Resources,
        _vm: &Arc<VmFd>,
        _memory: &Arc<Memory>,
        _exit: &ExitEvent,
    ) -> Result<Devices, Error> {
        if saved.contains_key(TEST) {
            return Devices::test(resources.control);
        }
        match saved.keys().next() {
            Some(name) => Err(Error::Unknown(name.clone())),
            None => Ok(Devices::default()),
        }
    }

    /// What is kept of each device.
    pub fn save(&self) -> Result<BTreeMap<String, serde_json::Value>, Error> {
        let mut saved = BTreeMap::new();
        if self.mailbox.is_some() {
            saved.insert(TEST.to_owned(), serde_json::Value::Null);
        }
        Ok(saved)
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
        self.mailbox.iter().map(|mailbox| mailbox.clone() as Arc<dyn Wakeup>).collect()
    }

    /// Where commands for the test guest go, if it is one.
    pub fn mailbox(&self) -> Option<&Arc<Mailbox>> {
        self.mailbox.as_ref()
    }
}
