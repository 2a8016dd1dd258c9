//! The device against a guest made by hand and real unix sockets.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use super::connection::BUFFER;
use super::device::{EVENT, FIRST_PORT, RX, TX};
use super::*;
use crate::bus::CountingIrq;
use crate::fixture::{Driver, Part, memory};
use crate::virtio::Transport;

const CID: u64 = 3;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

struct World {
    driver: Driver<Vsock>,
    path: std::path::PathBuf,
    buffers: std::collections::VecDeque<u64>,
    fwd_cnt: u32,
    _directory: tempfile::TempDir,
}

/// A packet as the guest sees it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    host_port: u32,
    guest_port: u32,
    op: u16,
    flags: u32,
    data: Vec<u8>,
}

fn listener() -> (Listener, std::path::PathBuf, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = Listener::new(UnixListener::bind(&path).unwrap().into()).unwrap();
    (listener, path, directory)
}

impl World {
    fn new() -> Self {
        let (listener, path, directory) = listener();
        let device = Vsock::new(CID, Some(listener));
        let transport = Transport::new(device, memory(), Arc::new(CountingIrq::default()));
        let driver = Driver::start(transport, 0);
        let mut world = Self {
            driver,
            path,
            buffers: std::collections::VecDeque::new(),
            fwd_cnt: 0,
            _directory: directory,
        };
        world.give_buffers(32);
        world
    }

    fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let at = self
                .driver
                .send(RX, &[Part::Writable(44), Part::Writable(4096)]);
            assert_eq!(at[1], at[0] + 48);
            self.buffers.push_back(at[0]);
        }
    }

    /// A connected client that asked for `port`.
    fn client(&mut self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        self.driver.transport.host_ready();
        stream
    }

    /// What the device sent to the guest; the buffers are given again.
    fn seen(&mut self) -> Vec<Seen> {
        let used = self.driver.used(RX);
        let mut all = Vec::new();
        for (_, len) in &used {
            let at = self.buffers.pop_front().unwrap();
            let header = self.driver.read(at, 44);
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let data = word(24);
            assert_eq!(*len, 44 + data);
            all.push(Seen {
                host_port: word(16),
                guest_port: word(20),
                op: u16::from_le_bytes([header[30], header[31]]),
                flags: word(32),
                data: self.driver.read(at + 48, data as usize),
            });
        }
        self.give_buffers(used.len());
        all
    }

    fn send(&mut self, host_port: u32, op: u16, flags: u32, data: &[u8]) {
        self.send_with(host_port, op, flags, data, 65536);
    }

    fn send_with(&mut self, host_port: u32, op: u16, flags: u32, data: &[u8], room: u32) {
        let mut bytes = Vec::new();
        bytes.extend(CID.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(49983u32.to_le_bytes());
        bytes.extend(host_port.to_le_bytes());
        bytes.extend((data.len() as u32).to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(op.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(room.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        let mut parts = vec![Part::Readable(bytes)];
        if !data.is_empty() {
            parts.push(Part::Readable(data.to_vec()));
        }
        self.driver.send(TX, &parts);
        assert_eq!(self.driver.used(TX).len(), 1);
    }

    /// A client whose connection the guest accepted, and its host port.
    fn connected(&mut self) -> (UnixStream, u32) {
        let mut stream = self.client(49983);
        let seen = self.seen();
        assert_eq!(
            (seen.len(), seen[0].op, seen[0].guest_port),
            (1, REQUEST, 49983)
        );
        let port = seen[0].host_port;
        self.send(port, RESPONSE, 0, &[]);
        let mut answer = vec![0; format!("OK {port}\n").len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {port}\n").as_bytes());
        stream.set_nonblocking(true).unwrap();
        (stream, port)
    }
}

fn is_over(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!(stream.read(&mut [0; 64]), Ok(0))
}

#[test]
fn data_flows_both_ways() {
    let mut world = World::new();
    let (mut stream, port) = world.connected();
    assert_eq!(port, FIRST_PORT);
    stream.write_all(b"to the guest").unwrap();
    world.driver.transport.host_ready();
    let seen = world.seen();
    assert_eq!(
        (seen[0].op, seen[0].data.as_slice()),
        (DATA, b"to the guest".as_slice())
    );
    world.send(port, DATA, 0, b"to the host");
    let mut back = [0; 11];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"to the host");
}

#[test]
fn refusals_and_garbage_end_the_stream() {
    let mut world = World::new();
    let mut stream = world.client(9);
    let port = world.seen()[0].host_port;
    // The guest answers from the port it was asked for, here another one: not this connection.
    world.send(port, RESPONSE, 0, &[]);
    assert_eq!(world.seen()[0].op, RESET);
    assert!(!is_over(&mut stream));

    let mut stream = world.client(49983);
    let port = world.seen()[0].host_port;
    world.send(port, RESET, 0, &[]);
    assert!(is_over(&mut stream));
    for greeting in [
        "GET / HTTP/1.1\r\n",
        "CONNECT x\n",
        "CONNECT 99999999999\n",
        "\n",
    ] {
        let mut stream = UnixStream::connect(&world.path).unwrap();
        stream.write_all(greeting.as_bytes()).unwrap();
        world.driver.transport.host_ready();
        assert!(is_over(&mut stream), "{greeting:?}");
    }
    assert!(world.seen().is_empty());
    assert_eq!(world.driver.transport.device().connections(), 1);
}

#[test]
fn the_guest_cannot_dial_and_unknown_packets_are_reset() {
    let mut world = World::new();
    world.send(1234, REQUEST, 0, &[]);
    world.send(1234, DATA, 0, b"x");
    world.send(1234, RESET, 0, &[]);
    let seen = world.seen();
    assert_eq!(seen.len(), 2);
    assert!(
        seen.iter()
            .all(|packet| packet.op == RESET && packet.host_port == 1234)
    );
    // Not a packet at all.
    world.driver.send(TX, &[Part::Readable(vec![0xff; 43])]);
    world.driver.send(TX, &[Part::Readable(vec![0xff; 100])]);
    world.driver.send(TX, &[Part::Writable(100)]);
    assert_eq!(world.driver.used(TX).len(), 3);
    assert!(world.seen().is_empty());
}

#[test]
fn the_guests_room_is_respected() {
    let mut world = World::new();
    let (mut stream, port) = world.connected();
    world.send_with(port, CREDIT_UPDATE, 0, &[], 10);
    stream.write_all(&[7; 25]).unwrap();
    world.driver.transport.host_ready();
    let seen = world.seen();
    assert_eq!(seen[0].data.len(), 10);
    assert_eq!(seen[1].op, CREDIT_REQUEST);
    assert_eq!(seen.len(), 2, "asked once, not again and again");
    world.fwd_cnt = 4;
    world.send_with(port, CREDIT_UPDATE, 0, &[], 10);
    assert_eq!(world.seen()[0].data.len(), 4);
    // Room taken back, then granted.
    world.send_with(port, CREDIT_UPDATE, 0, &[], 1);
    assert!(world.seen().iter().all(|packet| packet.data.is_empty()));
    world.fwd_cnt = 14;
    world.send_with(port, CREDIT_UPDATE, 0, &[], 100);
    assert_eq!(world.seen()[0].data.len(), 11);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_cut_off() {
    let mut world = World::new();
    let (stream, port) = world.connected();
    let mut sent = 0;
    let reset = loop {
        world.send(port, DATA, 0, &[1; 32768]);
        sent += 32768;
        if world.seen().iter().any(|packet| packet.op == RESET) {
            break true;
        }
        if sent > 4 * BUFFER as usize {
            break false;
        }
    };
    assert!(reset, "{sent} bytes were taken");
    assert_eq!(world.driver.transport.device().connections(), 0);
    drop(stream);
}

#[test]
fn a_reader_that_keeps_up_gets_everything() {
    let mut world = World::new();
    let (mut stream, port) = world.connected();
    let mut total = 0;
    let mut credit_updates = 0;
    for _ in 0..64 {
        world.send(port, DATA, 0, &[9; 32768]);
        let mut buffer = vec![0; 65536];
        while let Ok(read) = stream.read(&mut buffer) {
            total += read;
            world.driver.transport.host_ready();
        }
        credit_updates += world
            .seen()
            .iter()
            .filter(|packet| packet.op == CREDIT_UPDATE)
            .count();
    }
    assert_eq!(total, 64 * 32768);
    assert!(credit_updates >= 15, "{credit_updates}");
}

#[test]
fn both_sides_can_end_one_direction() {
    let mut world = World::new();
    let (mut stream, port) = world.connected();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    world.driver.transport.host_ready();
    let seen = world.seen();
    assert_eq!((seen[0].op, seen[0].flags), (SHUTDOWN, 2));
    world.send(port, DATA, 0, b"late answer");
    world.send(port, SHUTDOWN, 3, &[]);
    assert_eq!(world.seen()[0].op, RESET);
    stream.set_nonblocking(false).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"late answer");
    assert_eq!(world.driver.transport.device().connections(), 0);
}

#[test]
fn answers_wait_for_buffers_without_growing() {
    let (listener, _path, _directory) = listener();
    let device = Vsock::new(CID, Some(listener));
    let transport = Transport::new(device, memory(), Arc::new(CountingIrq::default()));
    let mut driver = Driver::start(transport, 0);
    let mut header = Vec::new();
    header.extend(CID.to_le_bytes());
    header.extend(2u64.to_le_bytes());
    header.extend([0; 12]);
    header.extend([1, 0, 1, 0]);
    header.extend([0; 12]);
    for _ in 0..200 {
        driver.send(TX, &[Part::Readable(header.clone())]);
    }
    assert_eq!(
        driver.used(TX).len(),
        64,
        "the rest waits in the guest's own queue"
    );
    for _ in 0..200 {
        driver.send(RX, &[Part::Writable(44)]);
    }
    driver.used(TX);
    assert_eq!(driver.used(RX).len(), 200);
}

#[test]
fn a_copy_tells_its_guest_that_streams_are_gone() {
    let mut world = World::new();
    let (mut stream, port) = world.connected();
    let event = world.driver.offer(EVENT, &[Part::Writable(4)]);
    let state = world.driver.transport.save();
    let (listener, path, _directory) = listener();
    let irq = Arc::new(CountingIrq::default());
    let memory = world.driver.memory.clone();
    let copy = Transport::<Vsock>::restore(&state, Some(listener), memory, irq.clone()).unwrap();
    let original = std::mem::replace(&mut world.driver.transport, copy);
    world.driver.transport.resume();
    assert_eq!(world.driver.used(EVENT), [(0, 4)]);
    assert_eq!(world.driver.read(event[0], 4), [0; 4]);
    assert!(irq.count() > 0);
    // Who connects before the guest has acted on it waits: the guest would end that stream too.
    let early = std::mem::replace(&mut world.path, path);
    let mut waiting = world.client(49983);
    assert!(world.seen().is_empty());
    world.driver.send(EVENT, &[Part::Writable(4)]);
    let seen = world.seen();
    assert_eq!((seen[0].op, seen[0].host_port), (REQUEST, port + 1));
    assert!(!is_over(&mut waiting));
    drop(early);
    // The old stream is unknown to the copy, a new one has a port of its own.
    world.send(port, DATA, 0, b"x");
    assert_eq!(world.seen()[0].op, RESET);
    let (_, new_port) = world.connected();
    assert_eq!(new_port, port + 2);
    // And the original's is whole.
    assert!(
        stream
            .read(&mut [0; 1])
            .is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock)
    );
    assert_eq!(original.device().connections(), 1);
}
