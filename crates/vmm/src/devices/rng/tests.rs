//! Bytes come, as many as fit, and differ.

use std::sync::Arc;

use super::*;
use crate::bus::CountingIrq;
use crate::fixture::{Driver, Part, memory};
use crate::virtio::Transport;

fn driver() -> Driver<Rng> {
    Driver::start(
        Transport::new(Rng, memory(), Arc::new(CountingIrq::default())),
        0,
    )
}

#[test]
fn buffers_are_filled_with_bytes_that_differ() {
    let mut driver = driver();
    let first = driver.send(0, &[Part::Writable(32), Part::Writable(32)]);
    let second = driver.send(0, &[Part::Writable(64)]);
    assert_eq!(driver.used(0), [(0, 64), (2, 64)]);
    let (a, b) = (driver.read(first[0], 32), driver.read(first[1], 32));
    assert!(a != b && a != vec![0; 32]);
    assert!(driver.read(second[0], 32) != a);
}

#[test]
fn a_request_is_bounded_and_a_senseless_one_is_empty() {
    let mut driver = driver();
    driver.send(0, &[Part::Writable(100_000)]);
    driver.send(0, &[Part::Readable(vec![0; 64])]);
    assert_eq!(driver.used(0), [(0, 4096), (1, 0)]);
    driver.offer(0, &[Part::Writable(64)]);
    driver.descriptor(0, 2, u64::MAX - 8, 64, 2, 0);
    driver.notify(0);
    assert_eq!(driver.used(0), [(2, 0)]);
}

#[test]
fn state_survives() {
    let mut driver = driver();
    driver.send(0, &[Part::Writable(8)]);
    let state = driver.transport.save();
    let irq = Arc::new(CountingIrq::default());
    let copy = Transport::<Rng>::restore(&state, driver.memory.clone(), irq).unwrap();
    assert_eq!(copy.save(), state);
}
