//! Which devices a machine has, what they are made of, and why they cannot be made.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use crate::boot::{acpi, layout};
use crate::bus;
use crate::devices::power::PowerSink;
use crate::devices::{block, generation, net, serial};
use crate::virtio;

/// Most disks of a machine: the slots that are left by the other devices.
pub const DISKS_MAX: usize = layout::VIRTIO_SLOTS as usize - 3;

/// Which devices a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Disks in order; true where writes are refused.
    pub disks: Vec<bool>,
    /// Address of the network card, if there is one.
    pub mac: Option<[u8; 6]>,
    /// Address of the guest for sockets, if there are any. 3 or more.
    pub cid: Option<u32>,
}

impl Plan {
    /// What the tables of the machine must describe.
    pub fn machine(&self, cpus: u8) -> acpi::Machine {
        acpi::Machine {
            cpus,
            virtio: self.slots(),
        }
    }

    pub(super) fn check(&self, handles: &Handles) -> Result<(), Error> {
        let (planned, given) = (self.disks.len(), handles.disks.len());
        match planned {
            _ if planned > DISKS_MAX => Err(Error::TooManyDisks(planned)),
            _ if planned != given => Err(Error::DiskCount { given, planned }),
            _ => Ok(()),
        }
    }

    fn slots(&self) -> u8 {
        let disks = u8::try_from(self.disks.len()).unwrap_or(u8::MAX);
        disks
            .saturating_add(u8::from(self.mac.is_some()))
            .saturating_add(u8::from(self.cid.is_some()))
            .saturating_add(1)
    }
}

/// What the devices use of the host, new for every machine.
#[derive(Debug, Default)]
pub struct Handles {
    /// One for each disk of the plan.
    pub disks: Vec<File>,
    /// The network card's tap.
    pub tap: Option<OwnedFd>,
    /// The unix socket programs of the host connect to.
    pub vsock: Option<OwnedFd>,
    /// Where the console writes.
    pub console: Option<OwnedFd>,
}

/// What the devices use of the machine.
#[derive(Debug, Clone)]
pub struct Wiring<'a, I> {
    /// Guest memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// Makes the line of an interrupt number.
    pub irq: &'a I,
    /// Who hears that the guest switched itself off.
    pub power: Arc<dyn PowerSink>,
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More disks than there are slots for.
    #[error("{0} disks are too many; a machine has at most {DISKS_MAX}")]
    TooManyDisks(usize),
    /// A file is missing or superfluous.
    #[error("{given} disk files were given for {planned} disks")]
    DiskCount {
        /// Files.
        given: usize,
        /// Disks of the machine.
        planned: usize,
    },
    /// A file is no disk.
    #[error("disk {index}")]
    Disk {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: block::device::Error,
    },
    /// A saved disk and a file do not go together.
    #[error("disk {index} of the saved machine")]
    DiskState {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: block::persist::Error,
    },
    /// The tap is unusable.
    #[error("the network device")]
    Net(#[source] net::device::Error),
    /// The listener is unusable.
    #[error("could not listen for connections to the guest")]
    Listen(#[source] std::io::Error),
    /// No descriptors left, or no memory.
    #[error("could not watch the devices' descriptors; raise the limit on open files (ulimit -n)")]
    Watch(#[source] io::Error),
    /// No generation identifier.
    #[error("the generation identifier")]
    Generation(#[from] generation::device::Error),
    /// A saved console is impossible.
    #[error("the console of the saved machine")]
    Console(#[from] serial::persist::Error),
    /// A saved transport is impossible.
    #[error("device {device} of the saved machine")]
    State {
        /// Which.
        device: &'static str,
        /// Why.
        #[source]
        source: virtio::Error,
    },
    /// The saved description is not one.
    #[error("the saved state of device {device} is damaged or of another version")]
    Format {
        /// Which.
        device: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The description lacks a device.
    #[error("the saved machine has no device {0}")]
    Missing(String),
    /// Two devices in one place.
    #[error("could not place device {device} on the bus")]
    Place {
        /// Which.
        device: &'static str,
        /// Why.
        #[source]
        source: bus::Error,
    },
}
