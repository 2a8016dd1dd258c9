//! The device the test guest talks to: commands in, reports out.

use std::sync::{Arc, Condvar, Mutex};

use forkd_wire::vmm::Reply;

use super::{ALIVE, FORBIDDEN};
use crate::bus::{BusDevice, lock};
use crate::control::Channel;
use crate::vcpu::{Wakeup, wait};

#[derive(Debug, Default)]
struct Slot {
    command: Option<(u32, [u32; 3])>,
    /// A pause wants the vCPU thread out of its wait.
    interrupted: bool,
}

/// Where the controller leaves a command for the guest.
#[derive(Debug, Default)]
pub struct Mailbox {
    slot: Mutex<Slot>,
    filled: Condvar,
}

impl Mailbox {
    /// Leaves a command; one that was not fetched yet is replaced.
    pub fn put(&self, op: u32, args: [u32; 3]) {
        lock(&self.slot).command = Some((op, args));
        self.filled.notify_all();
    }

    fn take(&self) -> (u32, [u32; 3]) {
        let mut slot = lock(&self.slot);
        loop {
            if let Some(command) = slot.command.take() {
                return command;
            }
            if std::mem::take(&mut slot.interrupted) {
                return (0, [0; 3]);
            }
            slot = wait(&self.filled, slot);
        }
    }

    fn is_full(&self) -> bool {
        lock(&self.slot).command.is_some()
    }
}

impl Wakeup for Mailbox {
    fn wake(&self) {
        lock(&self.slot).interrupted = true;
        self.filled.notify_all();
    }
}

/// The device. Unlike a real one it lets the vCPU thread wait inside a read: an idle test guest then
/// costs nothing, even where KVM interprets guest code.
#[derive(Debug)]
pub struct TestDevice {
    mailbox: Arc<Mailbox>,
    control: Arc<Channel>,
    args: [u32; 3],
    announced: bool,
}

impl TestDevice {
    /// A device that has said nothing yet.
    pub fn new(mailbox: Arc<Mailbox>, control: Arc<Channel>) -> TestDevice {
        TestDevice {
            mailbox,
            control,
            args: [0; 3],
            announced: false,
        }
    }

    fn report(&self, value: u64) {
        // A controller that is gone hears nothing; the main thread notices and ends the machine.
        _ = self.control.reply(0, &Reply::Report(value), &[]);
    }

    fn command(&mut self) -> u32 {
        if !self.announced {
            self.announced = true;
            self.report(ALIVE);
        }
        let (op, args) = self.mailbox.take();
        self.args = args;
        if op == FORBIDDEN {
            _ = rustix::process::getppid();
            self.report(ALIVE | u64::from(FORBIDDEN));
            return 0;
        }
        op
    }
}

impl BusDevice for TestDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            0 => self.command(),
            4 => self.args[0],
            8 => self.args[1],
            12 => self.args[2],
            16 => u32::from(self.mailbox.is_full()),
            _ => u32::MAX,
        };
        let len = data.len().min(4);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (20, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) {
            self.report(u64::from(u32::from_le_bytes(value)));
        }
    }
}
