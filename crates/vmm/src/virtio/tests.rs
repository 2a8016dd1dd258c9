//! The transport against a well-behaved driver, a hostile one, and a restored one.

use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress};

use super::mmio::Transport;
use super::{Chain, Device, Queues};
use crate::bus::{BusDevice as _, CountingIrq};
use crate::fixture::{Driver, Part, memory};

/// Answers each request with the number of its readable bytes.
#[derive(Debug, Default)]
struct Counter {
    active: Option<u64>,
    resets: u32,
}

impl Device for Counter {
    fn kind(&self) -> u32 {
        99
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 16]
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn activate(&mut self, features: u64) {
        self.active = Some(features);
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.active = None;
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5, 6]
    }

    fn process(&mut self, queue: usize, queues: &mut Queues) {
        while let Some(chain) = queues.next(queue) {
            let head = chain.head_index();
            let bytes = readable(chain);
            queues.push(queue, head, bytes);
        }
    }
}

fn readable(chain: Chain) -> u32 {
    chain.readable().map(|part| part.len()).sum()
}

fn transport() -> (Transport<Counter>, Arc<CountingIrq>) {
    let irq = Arc::new(CountingIrq::default());
    (
        Transport::new(Counter::default(), memory(), irq.clone()),
        irq,
    )
}

fn read(transport: &mut Transport<Counter>, offset: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &mut Transport<Counter>, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

#[test]
fn identity_and_configuration_are_readable() {
    let (mut transport, _) = transport();
    assert_eq!(read(&mut transport, 0), 0x7472_6976);
    assert_eq!(read(&mut transport, 4), 2);
    assert_eq!(read(&mut transport, 8), 99);
    assert_eq!(read(&mut transport, 0x34), 16);
    let mut config = [0xee; 8];
    transport.read(0x100, &mut config);
    assert_eq!(config, [1, 2, 3, 4, 5, 6, 0, 0]);
    transport.read(0x105, &mut config[..1]);
    assert_eq!(config[0], 6);
    transport.read(0xfff, &mut config[..1]);
    assert_eq!(config[0], 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (mut transport, _) = transport();
    write(&mut transport, 0x70, 1);
    write(&mut transport, 0x70, 3);
    write(&mut transport, 0x24, 0);
    write(&mut transport, 0x20, 1 << 6);
    write(&mut transport, 0x24, 1);
    write(&mut transport, 0x20, 1);
    write(&mut transport, 0x70, 0xb);
    assert_eq!(read(&mut transport, 0x70), 3, "FEATURES_OK stays clear");
    write(&mut transport, 0x70, 0x7);
    assert_eq!(read(&mut transport, 0x70), 3, "and nothing runs without it");
    assert!(!transport.is_active());
    // Version 1 is not optional either.
    write(&mut transport, 0x20, 0);
    write(&mut transport, 0x24, 0);
    write(&mut transport, 0x20, 0);
    write(&mut transport, 0x70, 0xb);
    assert_eq!(read(&mut transport, 0x70), 3);
}

#[test]
fn requests_are_served_and_reset_forgets_them() {
    let (transport, irq) = transport();
    let mut driver = Driver::start(transport, 1 << 5);
    assert_eq!(driver.transport.device().active, Some((1 << 32) | (1 << 5)));
    driver.send(
        0,
        &[Part::Readable(vec![0; 100]), Part::Readable(vec![0; 23])],
    );
    assert_eq!(driver.used(0), [(0, 123)]);
    assert_eq!(irq.count(), 1);
    driver.send(1, &[Part::Readable(vec![0; 7])]);
    assert_eq!(driver.used(1).len(), 1);

    write(&mut driver.transport, 0x70, 0);
    assert_eq!(
        driver.transport.device().resets,
        2,
        "one at the start, one now"
    );
    assert_eq!(
        read(&mut driver.transport, 0x44),
        0,
        "the queue is not ready any more"
    );
    let before = irq.count();
    write(&mut driver.transport, 0x50, 0);
    assert_eq!(irq.count(), before);
}

#[test]
fn a_ring_that_makes_no_sense_stops_the_device() {
    let (transport, irq) = transport();
    let mut driver = Driver::start(transport, 0);
    // More requests than the ring holds.
    driver
        .memory
        .write_obj(5000u16, GuestAddress(driver.avail(0) + 2))
        .unwrap();
    write(&mut driver.transport, 0x50, 0);
    assert_ne!(read(&mut driver.transport, 0x70) & 0x40, 0, "NEEDS_RESET");
    assert_eq!(read(&mut driver.transport, 0x60) & 2, 2);
    assert_eq!(irq.count(), 1);
    assert!(!driver.transport.is_active());
    // A reset makes it usable again.
    let mut driver = Driver::start(driver.transport, 0);
    driver.send(0, &[Part::Readable(vec![0; 1])]);
    assert_eq!(driver.used(0), [(0, 1)]);
}

#[test]
fn rings_outside_memory_are_refused() {
    let (transport, _) = transport();
    let transport = Driver::start_with_rings_at(transport, 0, 0xffff_ffff_ffff_0000);
    assert!(!transport.is_active());
}

#[test]
fn state_survives_and_impossible_state_is_refused() {
    let (transport, _) = transport();
    let mut driver = Driver::start(transport, 1 << 5);
    driver.send(0, &[Part::Readable(vec![0; 9])]);
    driver.used(0);
    let state = driver.transport.save_transport();
    let json = serde_json::to_value(&state).unwrap();

    let irq = Arc::new(CountingIrq::default());
    let mut copy = Transport::new(Counter::default(), driver.memory.clone(), irq.clone());
    copy.restore_transport(&serde_json::from_value(json.clone()).unwrap())
        .unwrap();
    assert_eq!(copy.save_transport(), state);
    assert!(copy.is_active());
    copy.resume();
    assert_eq!(
        irq.count(),
        1,
        "the interrupt not yet acknowledged is repeated"
    );
    driver.transport = copy;
    driver.send(0, &[Part::Readable(vec![0; 10])]);
    assert_eq!(driver.used(0), [(1, 10)]);

    for (pointer, value) in [
        ("/queues/0/size", 3u64),
        ("/queues/0/size", 32),
        ("/queues/0/max_size", 32),
        ("/queues/0/desc_table", 8),
        ("/driver_features", u64::MAX),
    ] {
        let mut bad = json.clone();
        *bad.pointer_mut(pointer).unwrap() = value.into();
        let mut copy = Transport::new(Counter::default(), memory(), irq.clone());
        let state = serde_json::from_value(bad).unwrap();
        assert!(
            copy.restore_transport(&state).is_err(),
            "{pointer} = {value}"
        );
    }
    let mut more = json.clone();
    more["queues"].as_array_mut().unwrap().pop();
    let mut copy = Transport::new(Counter::default(), memory(), irq.clone());
    assert!(
        copy.restore_transport(&serde_json::from_value(more).unwrap())
            .is_err()
    );
    let mut unknown = json;
    unknown["more"] = 1.into();
    assert!(serde_json::from_value::<super::persist::TransportState>(unknown).is_err());
}

#[test]
fn a_flood_of_requests_does_not_keep_the_thread() {
    let poller = super::poll::Poller::new().unwrap();
    let (mut transport, _) = transport();
    transport.watch(&poller, 7).unwrap();
    let mut driver = Driver::start(transport, 0);
    // The same descriptor offered again and again, as a second vCPU could do meanwhile, is
    // imitated by a device that is asked many times: each turn is bounded.
    for _ in 0..300 {
        for _ in 0..8 {
            driver.offer(0, &[Part::Readable(vec![0; 1])]);
        }
        driver.notify(0);
        assert_eq!(driver.used(0).len(), 8);
    }
}
