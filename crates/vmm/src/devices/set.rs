//! All devices of a Linux guest: which there are, made together, found on the buses, saved and made again.
//!
//! The order of virtio devices is the order in which Linux finds them, so it is fixed: disks (the
//! first is `vda`), network card, sockets, entropy.

mod plan;

pub use plan::{DISKS_MAX, Error, Handles, Plan, Wiring};

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use serde::Serialize;
use serde::de::DeserializeOwned;
use vm_memory::GuestMemoryMmap;

use super::block::{Block, BlockState, Disk};
use super::generation::{Generation, GenerationState};
use super::net::{Net, NetState, Tap};
use super::power::{Keyboard, Power};
use super::rng::{Rng, RngState};
use super::serial::{Console, ConsoleState, Sink};
use super::vsock::{Listener, Vsock, VsockState};
use crate::boot::layout;
use crate::bus::{Bus, BusDevice, IrqLine, Range, Shared, lock};
use crate::virtio::poll::Poller;
use crate::virtio::{self, Device, Transport};

/// The devices of one machine.
#[derive(Debug)]
pub struct Set {
    plan: Plan,
    disks: Vec<Shared<Transport<Block>>>,
    net: Option<Shared<Transport<Net>>>,
    vsock: Option<Shared<Transport<Vsock>>>,
    rng: Shared<Transport<Rng>>,
    console: Shared<Console>,
    generation: Shared<Generation>,
    power: Shared<Power>,
    keyboard: Shared<Keyboard>,
    poller: Poller,
}

/// Saved devices by name.
pub type Saved = BTreeMap<String, serde_json::Value>;

fn shared<T>(device: T) -> Shared<T> {
    Arc::new(Mutex::new(device))
}

/// The slots of virtio devices, given out in order.
struct Slots<'a, I>(u8, &'a Wiring<'a, I>);

impl<I: Fn(u32) -> Arc<dyn IrqLine>> Slots<'_, I> {
    fn next(&mut self) -> (Arc<GuestMemoryMmap>, Arc<dyn IrqLine>) {
        let gsi = layout::virtio_gsi(self.0);
        self.0 += 1;
        (self.1.memory.clone(), (self.1.irq)(gsi))
    }

    fn put<D: Device>(&mut self, device: D) -> Shared<Transport<D>> {
        let (memory, irq) = self.next();
        shared(Transport::new(device, memory, irq))
    }
}

fn open_disk((index, (file, read_only)): (usize, (File, &bool))) -> Result<Disk, Error> {
    Disk::new(file, *read_only).map_err(|source| Error::Disk { index, source })
}

fn open_tap(fd: Option<OwnedFd>) -> Result<Option<Tap>, Error> {
    fd.map(Tap::new).transpose().map_err(Error::Net)
}

fn open_listener(fd: Option<OwnedFd>) -> Result<Option<Listener>, Error> {
    fd.map(Listener::new).transpose().map_err(Error::Listen)
}

impl Set {
    /// Makes the devices of a machine that has never run.
    pub fn new<I>(plan: Plan, handles: Handles, wiring: &Wiring<'_, I>) -> Result<Self, Error>
    where
        I: Fn(u32) -> Arc<dyn IrqLine>,
    {
        plan.check(&handles)?;
        let mut slots = Slots(0, wiring);
        let mut disks = Vec::new();
        for (index, found) in handles.disks.into_iter().zip(&plan.disks).enumerate() {
            let disk = open_disk((index, found))?;
            disks.push(slots.put(Block::new(disk, &format!("forkd-disk-{index}"))));
        }
        let tap = open_tap(handles.tap)?;
        let net = plan.mac.map(|mac| slots.put(Net::new(tap, mac)));
        let listener = open_listener(handles.vsock)?;
        let vsock = plan
            .cid
            .map(|cid| slots.put(Vsock::new(u64::from(cid), listener)));
        let rng = slots.put(Rng);
        let sink = Sink::new(handles.console.map(File::from));
        let console = Console::new(sink, (wiring.irq)(layout::SERIAL_GSI));
        let line = (wiring.irq)(layout::GENERATION_GSI);
        let generation = Generation::new(wiring.memory.clone(), line)?;
        Self::assemble(plan, disks, net, vsock, rng, (console, generation), wiring)
    }

    /// Makes the devices of a copy of a machine. Call [`Set::resume`] before its first instruction.
    pub fn restore<I>(
        saved: &Saved,
        handles: Handles,
        wiring: &Wiring<'_, I>,
    ) -> Result<Self, Error>
    where
        I: Fn(u32) -> Arc<dyn IrqLine>,
    {
        let plan: Plan = get(saved, PLAN)?;
        plan.check(&handles)?;
        let mut slots = Slots(0, wiring);
        let mut disks = Vec::new();
        for (index, found) in handles.disks.into_iter().zip(&plan.disks).enumerate() {
            let disk = open_disk((index, found))?;
            let state: BlockState = get(saved, &disk_name(index))?;
            let (memory, irq) = slots.next();
            let device = Transport::<Block>::restore(&state, disk, memory, irq)
                .map_err(|source| Error::DiskState { index, source })?;
            disks.push(shared(device));
        }
        let mut net = None;
        if plan.mac.is_some() {
            let state: NetState = get(saved, NET)?;
            let (memory, irq) = slots.next();
            let device = Transport::<Net>::restore(&state, open_tap(handles.tap)?, memory, irq);
            net = Some(shared(device.map_err(failed(NET))?));
        }
        let mut vsock = None;
        if plan.cid.is_some() {
            let state: VsockState = get(saved, VSOCK)?;
            let (memory, irq) = slots.next();
            let listener = open_listener(handles.vsock)?;
            let device = Transport::<Vsock>::restore(&state, listener, memory, irq);
            vsock = Some(shared(device.map_err(failed(VSOCK))?));
        }
        let state: RngState = get(saved, RNG)?;
        let (memory, irq) = slots.next();
        let rng = shared(Transport::<Rng>::restore(&state, memory, irq).map_err(failed(RNG))?);
        let state: ConsoleState = get(saved, CONSOLE)?;
        let sink = Sink::new(handles.console.map(File::from));
        let console = Console::restore(&state, sink, (wiring.irq)(layout::SERIAL_GSI))?;
        let state: GenerationState = get(saved, GENERATION)?;
        let line = (wiring.irq)(layout::GENERATION_GSI);
        let generation = Generation::restore(&state, wiring.memory.clone(), line);
        Self::assemble(plan, disks, net, vsock, rng, (console, generation), wiring)
    }

    /// Puts made devices together with those that have no state, and watches their descriptors.
    fn assemble<I>(
        plan: Plan,
        disks: Vec<Shared<Transport<Block>>>,
        net: Option<Shared<Transport<Net>>>,
        vsock: Option<Shared<Transport<Vsock>>>,
        rng: Shared<Transport<Rng>>,
        (console, generation): (Console, Generation),
        wiring: &Wiring<'_, I>,
    ) -> Result<Self, Error> {
        let set = Self {
            plan,
            disks,
            net,
            vsock,
            rng,
            console: shared(console),
            generation: shared(generation),
            power: shared(Power::new(wiring.power.clone())),
            keyboard: shared(Keyboard::new(wiring.power.clone())),
            poller: Poller::new().map_err(Error::Watch)?,
        };
        set.watch().map_err(Error::Watch)?;
        Ok(set)
    }

    /// What is kept of each device. The vCPUs are parked, so no request is under way.
    pub fn save(&self) -> Result<Saved, Error> {
        let mut saved = Saved::new();
        put(&mut saved, PLAN, &self.plan)?;
        for (index, disk) in self.disks.iter().enumerate() {
            put(&mut saved, &disk_name(index), &lock(disk).save())?;
        }
        if let Some(net) = &self.net {
            put(&mut saved, NET, &lock(net).save())?;
        }
        if let Some(vsock) = &self.vsock {
            put(&mut saved, VSOCK, &lock(vsock).save())?;
        }
        put(&mut saved, RNG, &lock(&self.rng).save())?;
        put(&mut saved, CONSOLE, &lock(&self.console).save())?;
        put(&mut saved, GENERATION, &lock(&self.generation).save())?;
        Ok(saved)
    }

    /// A copy is about to run: it gets an identifier of its own, hears that its connections are gone,
    /// and takes up what waited. The interrupt controllers must have been restored.
    pub fn resume(&self) -> Result<(), Error> {
        lock(&self.generation).renew()?;
        for disk in &self.disks {
            lock(disk).resume();
        }
        if let Some(net) = &self.net {
            lock(net).resume();
        }
        if let Some(vsock) = &self.vsock {
            lock(vsock).resume();
        }
        lock(&self.rng).resume();
        Ok(())
    }

    /// Puts every device where the tables say it is.
    pub fn place(&self, pio: &mut Bus, mmio: &mut Bus) -> Result<(), Error> {
        put_on(pio, layout::SERIAL, CONSOLE, self.console.clone())?;
        put_on(pio, layout::POWER, POWER, self.power.clone())?;
        put_on(pio, layout::KEYBOARD, KEYBOARD, self.keyboard.clone())?;
        let mut slots = (0..).map(layout::virtio);
        let mut place = |name, device: Shared<dyn BusDevice>| match slots.next() {
            Some(range) => put_on(mmio, range, name, device),
            None => Ok(()),
        };
        for disk in &self.disks {
            place("disk", disk.clone())?;
        }
        if let Some(net) = &self.net {
            place(NET, net.clone())?;
        }
        if let Some(vsock) = &self.vsock {
            place(VSOCK, vsock.clone())?;
        }
        place(RNG, self.rng.clone())
    }

    /// Serves what happened on the host's side. Called when [`Set::as_fd`] is readable.
    pub fn serve(&self) {
        for token in self.poller.take() {
            let Ok(slot) = usize::try_from(token) else {
                continue;
            };
            if let Some(disk) = self.disks.get(slot) {
                lock(disk).host_ready();
            }
            match (token, &self.net, &self.vsock) {
                (NET_TOKEN, Some(net), _) => lock(net).host_ready(),
                (VSOCK_TOKEN, _, Some(vsock)) => lock(vsock).host_ready(),
                (RNG_TOKEN, ..) => lock(&self.rng).host_ready(),
                _ => {}
            }
        }
    }

    fn watch(&self) -> io::Result<()> {
        for (token, disk) in (0..).zip(&self.disks) {
            lock(disk).watch(&self.poller, token)?;
        }
        if let Some(net) = &self.net {
            lock(net).watch(&self.poller, NET_TOKEN)?;
        }
        if let Some(vsock) = &self.vsock {
            lock(vsock).watch(&self.poller, VSOCK_TOKEN)?;
        }
        lock(&self.rng).watch(&self.poller, RNG_TOKEN)
    }

    /// The machine stops: output that is still held is passed on.
    pub fn flush(&self) {
        lock(&self.console).flush();
    }

    /// Which devices there are.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The identifier the guest sees.
    pub fn generation(&self) -> [u8; 16] {
        lock(&self.generation).current()
    }
}

/// Tokens of the devices that are no disks; a disk's is its number.
const NET_TOKEN: u64 = 1000;
const VSOCK_TOKEN: u64 = 1001;
const RNG_TOKEN: u64 = 1002;

impl AsFd for Set {
    /// Readable while [`Set::serve`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}

const PLAN: &str = "plan";
const NET: &str = "net";
const VSOCK: &str = "vsock";
const RNG: &str = "rng";
const CONSOLE: &str = "console";
const GENERATION: &str = "generation";
const POWER: &str = "power";
const KEYBOARD: &str = "keyboard";

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

fn put<T: Serialize>(saved: &mut Saved, name: &str, state: &T) -> Result<(), Error> {
    let value = serde_json::to_value(state).map_err(|source| Error::Format {
        device: name.to_owned(),
        source,
    })?;
    saved.insert(name.to_owned(), value);
    Ok(())
}

fn get<T: DeserializeOwned>(saved: &Saved, name: &str) -> Result<T, Error> {
    let value = saved
        .get(name)
        .ok_or_else(|| Error::Missing(name.to_owned()))?;
    T::deserialize(value).map_err(|source| Error::Format {
        device: name.to_owned(),
        source,
    })
}

fn failed(device: &'static str) -> impl Fn(virtio::Error) -> Error {
    move |source| Error::State { device, source }
}

fn put_on(
    bus: &mut Bus,
    range: Range,
    device: &'static str,
    shared: Shared<dyn BusDevice>,
) -> Result<(), Error> {
    bus.insert(range, shared)
        .map_err(|source| Error::Place { device, source })
}

#[cfg(test)]
mod tests;
