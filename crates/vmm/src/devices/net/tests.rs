//! Frames both ways over a datagram socket that stands for the tap.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use super::device::{FRAME_MAX, HEADER_LEN, RX, TX};
use super::*;
use crate::bus::CountingIrq;
use crate::fixture::{Driver, Part, memory};
use crate::virtio::Transport;

const MERGE: u64 = 1 << 15;

fn driver(features: u64) -> (Driver<Net>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let net = Net::new(
        Some(Tap::datagrams(ours.into()).unwrap()),
        [2, 0, 0, 0, 0, 1],
    );
    let transport = Transport::new(net, memory(), Arc::new(CountingIrq::default()));
    (Driver::start(transport, features), theirs)
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|at| at as u8).collect();
    frame[..HEADER_LEN].fill(0);
    frame
}

#[test]
fn frames_are_sent_whole() {
    let (mut driver, wire) = driver(0);
    let sent = frame(200);
    driver.send(
        TX,
        &[
            Part::Readable(sent[..12].to_vec()),
            Part::Readable(sent[12..].to_vec()),
        ],
    );
    let mut received = [0; 300];
    let len = wire.recv(&mut received).unwrap();
    assert_eq!(received[..len], sent);
    assert_eq!(driver.used(TX).len(), 1);
}

#[test]
fn what_is_no_frame_is_dropped() {
    let (mut driver, wire) = driver(0);
    driver.send(TX, &[Part::Readable(vec![0; 11])]);
    driver.send(TX, &[Part::Readable(vec![0; FRAME_MAX + 1])]);
    driver.send(TX, &[Part::Writable(100)]);
    assert_eq!(driver.used(TX).len(), 3);
    assert!(wire.recv(&mut [0; 10]).is_err());
}

#[test]
fn a_frame_waits_for_buffers_and_is_spread_over_them() {
    let (mut driver, wire) = driver(MERGE);
    let sent = frame(250);
    wire.send(&sent).unwrap();
    driver.transport.host_ready();
    driver.send(RX, &[Part::Writable(100)]);
    driver.send(RX, &[Part::Writable(100)]);
    assert!(driver.used(RX).is_empty(), "two buffers are too few");
    let last = driver.send(RX, &[Part::Writable(100)]);
    assert_eq!(driver.used(RX), [(0, 100), (1, 100), (2, 50)]);
    assert_eq!(driver.read(last[0], 50), sent[200..]);
    let first = last[0] - 2 * 112;
    assert_eq!(
        driver.read(first + 10, 2),
        [3, 0],
        "the header says how many buffers"
    );
}

#[test]
fn a_frame_too_large_for_its_one_buffer_is_lost() {
    let (mut driver, wire) = driver(0);
    driver.offer(RX, &[Part::Writable(100)]);
    driver.offer(RX, &[Part::Writable(2000)]);
    wire.send(&frame(1000)).unwrap();
    wire.send(&frame(60)).unwrap();
    driver.transport.host_ready();
    assert_eq!(driver.used(RX), [(0, 0), (1, 60)]);
}

#[test]
fn without_a_tap_nothing_arrives_and_nothing_breaks() {
    let net = Net::new(None, [2, 0, 0, 0, 0, 1]);
    let irq = Arc::new(CountingIrq::default());
    let mut driver = Driver::start(Transport::new(net, memory(), irq), 0);
    driver.send(TX, &[Part::Readable(frame(100))]);
    driver.send(RX, &[Part::Writable(100)]);
    assert_eq!(driver.used(TX).len(), 1);
    assert!(driver.used(RX).is_empty());
}

#[test]
fn a_copy_has_the_address_and_another_wire() {
    let (mut driver, wire) = driver(MERGE);
    driver.offer(RX, &[Part::Writable(2000)]);
    let state = driver.transport.save();
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let tap = Tap::datagrams(ours.into()).unwrap();
    let irq = Arc::new(CountingIrq::default());
    let copy = Transport::<Net>::restore(&state, Some(tap), driver.memory.clone(), irq).unwrap();
    assert_eq!(copy.save(), state);
    driver.transport = copy;
    drop(wire);
    theirs.send(&frame(80)).unwrap();
    driver.transport.resume();
    assert_eq!(driver.used(RX), [(0, 80)]);
}

#[test]
fn a_file_is_no_tap() {
    let file = tempfile::tempfile().unwrap();
    assert!(Tap::new(file.into()).is_err());
}
