//! The registers of a virtio device (version 2 of the MMIO transport).
//!
//! ```text
//!   reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK ─► serving
//!     ▲                                 │ refused: the bit        │ a ring makes no sense
//!     └── status = 0 ◄──────────────────┘ stays clear             ▼
//!                                                             NEEDS_RESET
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
    VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::GuestMemoryMmap;

use super::persist::TransportState;
use super::poll::Poller;
use super::{Device, Queues};
use crate::bus::{BusDevice, IrqLine};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"frkd");
const EVENT_INDEX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const TRANSPORT_FEATURES: u64 = VERSION_1 | EVENT_INDEX | (1 << VIRTIO_RING_F_INDIRECT_DESC);

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// Bits a driver may set.
const DRIVER_BITS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// One virtio device with its registers.
#[derive(Debug)]
pub struct Transport<D> {
    pub(super) device: D,
    pub(super) queues: Queues,
    irq: Arc<dyn IrqLine>,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    /// Wakes the event loop for what a turn left unfinished. Exists once the loop knows the device.
    again: Option<OwnedFd>,
}

impl<D: Device> Transport<D> {
    /// Puts `device` behind registers that are as after a reset.
    pub fn new(device: D, memory: Arc<GuestMemoryMmap>, irq: Arc<dyn IrqLine>) -> Self {
        let queues = Queues::new(device.queue_sizes(), memory);
        Self {
            device,
            queues,
            irq,
            features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            again: None,
        }
    }

    /// The device behind the registers.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        self.queues.memory()
    }

    /// Changes the device behind the registers. The caller sees to it that a change of the
    /// configuration space is followed by [`Transport::config_changed`].
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Whether the driver is using the device.
    pub fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & (NEEDS_RESET | FAILED) == 0
    }

    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.is_active() {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The machine runs again after a restore: goes on with what waited for the host, and repeats an
    /// interrupt the driver has not acknowledged (one too many is harmless, one too few is not).
    pub fn resume(&mut self) {
        if self.is_active() {
            self.device.ready(&mut self.queues);
            self.serve((1 << self.queues.rings.len()) - 1);
            if self.interrupt_status != 0 {
                self.irq.raise();
            }
        }
    }

    /// Something happened on the host's side of the device.
    pub fn host_ready(&mut self) {
        if let Some(again) = &self.again {
            rustix::io::read(again, &mut [0; 8]).ok();
        }
        if self.is_active() {
            let postponed = self.queues.begin();
            self.device.ready(&mut self.queues);
            self.serve(postponed);
        }
    }

    /// Lets the device look at `queues`, a bit each.
    fn serve(&mut self, queues: u32) {
        self.queues.begin();
        for queue in (0..self.queues.rings.len()).filter(|queue| queues & (1 << queue) != 0) {
            self.device.process(queue, &mut self.queues);
        }
        self.settle();
    }

    /// Lets `poller` report under `token` when [`Transport::host_ready`] has something to do.
    pub fn watch(&mut self, poller: &Poller, token: u64) -> io::Result<()> {
        if let Some(fd) = self.device.poll_fd() {
            poller.watch(fd, token)?;
        }
        let again = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        poller.watch(&again, token)?;
        self.again = Some(again);
        Ok(())
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    pub(super) fn registers(&self) -> TransportState {
        TransportState {
            features_select: self.features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            status: self.status,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: Vec::new(),
        }
    }

    pub(super) fn set_registers(&mut self, state: &TransportState) {
        self.features_select = state.features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.status = state.status;
        self.interrupt_status = state.interrupt_status;
        self.config_generation = state.config_generation;
        if self.status & DRIVER_OK != 0 {
            self.queues.check(self.driver_features & EVENT_INDEX != 0);
            self.device.activate(self.driver_features);
        }
    }

    /// After the device did something: interrupts, and the end of trust in a broken ring.
    fn settle(&mut self) {
        if self.queues.wants_interrupt() {
            self.interrupt(VIRTIO_MMIO_INT_VRING);
        }
        if self.queues.is_broken() && self.status & NEEDS_RESET == 0 {
            self.status |= NEEDS_RESET;
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
        if let (true, Some(again)) = (self.queues.is_postponed(), &self.again) {
            rustix::io::write(again, &1u64.to_ne_bytes()).ok();
        }
    }

    fn interrupt(&mut self, cause: u32) {
        self.interrupt_status |= cause;
        self.irq.raise();
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => word(self.offered(), self.features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.ring().map_or(0, |ring| u32::from(ring.max_size())),
            VIRTIO_MMIO_QUEUE_READY => self.ring().map_or(0, |ring| u32::from(ring.ready())),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            // No shared memory: a region of length and base -1 does not exist.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notified(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt_status &= !value,
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.write_ring_register(offset, value),
        }
    }

    /// A ring is set up between feature negotiation and the start of the device; after that it
    /// can only be stopped.
    fn write_ring_register(&mut self, offset: u32, value: u32) {
        let negotiated = self.status & FEATURES_OK != 0;
        let running = self.status & DRIVER_OK != 0;
        let index = self.queue_select as usize;
        let Some(ring) = self.queues.rings.get_mut(index).filter(|_| negotiated) else {
            return;
        };
        if offset == VIRTIO_MMIO_QUEUE_READY && (!running || value == 0) {
            ring.set_ready(value == 1);
        }
        if running || ring.ready() {
            return;
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => ring.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => ring.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => ring.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => ring.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => ring.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => ring.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => ring.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn ring(&self) -> Option<&Queue> {
        self.queues.rings.get(self.queue_select as usize)
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & FEATURES_OK == 0 {
            let shift = match self.driver_features_select {
                0 => 0,
                1 => 32,
                _ => return,
            };
            let kept = self.driver_features & !(u64::from(u32::MAX) << shift);
            self.driver_features = kept | (u64::from(value) << shift);
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = value & DRIVER_BITS & !self.status;
        let acceptable =
            self.driver_features & !self.offered() == 0 && self.driver_features & VERSION_1 != 0;
        if new & FEATURES_OK != 0 && !acceptable {
            new &= !FEATURES_OK;
        }
        // Nothing runs before features were agreed on.
        if (self.status | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.status |= new;
        if new & DRIVER_OK != 0 {
            self.queues.check(self.driver_features & EVENT_INDEX != 0);
            self.device.activate(self.driver_features);
            // What happened on the host's side before was not looked at.
            self.host_ready();
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.reset();
        self.features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.status = 0;
        self.interrupt_status = 0;
    }

    fn notified(&mut self, queue: u32) {
        let queue = queue as usize;
        if self.is_active() && queue < self.queues.rings.len() {
            let postponed = self.queues.begin();
            self.serve(postponed | (1 << queue));
        }
    }
}

fn word(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

impl<D: Device> BusDevice for Transport<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match u32::try_from(offset) {
            Ok(offset) if offset < VIRTIO_MMIO_CONFIG => {
                // The specification allows nothing but aligned 32-bit accesses here.
                if let (true, Ok(word)) = (offset % 4 == 0, <&mut [u8; 4]>::try_from(data)) {
                    *word = self.read_register(offset).to_le_bytes();
                }
            }
            Ok(offset) => {
                let config = self.device.config();
                let start = (offset - VIRTIO_MMIO_CONFIG) as usize;
                let there = config.get(start..).unwrap_or_default();
                let len = there.len().min(data.len());
                data[..len].copy_from_slice(&there[..len]);
            }
            Err(_) => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // No device of ours has a configuration the driver may change.
        if let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data))
            && offset < VIRTIO_MMIO_CONFIG
            && offset % 4 == 0
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}
