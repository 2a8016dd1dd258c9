//! Carries packets between the guest's queues and the connections.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::connection::Connection;
use super::request::{DATA_MAX, HEADER_LEN, Op, Packet, Refused};
use crate::virtio::poll::Poller;
use crate::virtio::{Chain, Device, Queues, kind};

const QUEUE_SIZES: &[u16] = &[256, 256, 16];
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;

/// Most connections at a time; further ones are closed at once. Each may hold a few hundred KiB.
pub const CONNECTIONS_MAX: usize = 512;
/// Most answers waiting for the guest's buffers. While there are that many, nothing more is taken from it.
const ANSWERS_MAX: usize = 64;
/// Host ports are given out from here, out of the way of those a guest might expect to be served.
pub(super) const FIRST_PORT: u32 = 1 << 30;
const LISTENER: u64 = u64::MAX;
/// The event "all connections are gone".
const TRANSPORT_RESET: u32 = 0;

/// The host's end: where programs connect.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    poller: Poller,
}

impl Listener {
    /// Takes over a listening unix stream socket.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = UnixListener::from(fd);
        socket.set_nonblocking(true)?;
        let poller = Poller::new()?;
        poller.watch(&socket, LISTENER)?;
        Ok(Self { socket, poller })
    }
}

/// How far a copy's guest has got with the news that its connections are gone. It ends every
/// connection it has when it hears of it, new ones included, so none is made before it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reset {
    /// It has to be told.
    Due,
    /// It was told, when its event queue bore this mark; it puts a buffer back when it has acted.
    Told(u16),
    /// It knows, or there is nothing to know.
    Done,
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    pub(super) cid: u64,
    listener: Option<Listener>,
    connections: BTreeMap<u32, Connection>,
    /// Ports of connections that may have something for the guest, in the order they are served.
    turns: VecDeque<u32>,
    pub(super) next_port: u32,
    answers: VecDeque<Packet>,
    /// Requests wait in the queue because there were too many answers.
    held: bool,
    pub(super) reset: Reset,
    data: Vec<u8>,
}

impl Vsock {
    /// A device for the guest's address `cid`. Without a listener nobody can connect.
    pub fn new(cid: u64, listener: Option<Listener>) -> Self {
        Self {
            cid,
            listener,
            connections: BTreeMap::new(),
            turns: VecDeque::new(),
            next_port: FIRST_PORT,
            answers: VecDeque::new(),
            held: false,
            reset: Reset::Done,
            data: Vec::new(),
        }
    }

    /// Streams that exist.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    fn accept(&mut self) {
        if self.reset != Reset::Done {
            // Programs wait in the socket's backlog.
            return;
        }
        while let Some(listener) = &self.listener {
            match listener.socket.accept() {
                Ok((stream, _)) => self.adopt(stream),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn adopt(&mut self, stream: UnixStream) {
        let Some(listener) = &self.listener else {
            return;
        };
        if self.connections.len() >= CONNECTIONS_MAX || stream.set_nonblocking(true).is_err() {
            return;
        }
        while self.connections.contains_key(&self.next_port) {
            self.next_port = following(self.next_port);
        }
        let port = self.next_port;
        self.next_port = following(port);
        if listener.poller.watch(&stream, u64::from(port)).is_ok() {
            let mut connection = Connection::new(stream, port);
            connection.host_ready();
            self.connections.insert(port, connection);
            self.after(port);
        }
    }

    /// A connection did something: it gets a turn, or ends.
    fn after(&mut self, port: u32) {
        let Some(connection) = self.connections.get(&port) else {
            return;
        };
        if connection.has_output() {
            if !self.turns.contains(&port) {
                self.turns.push_back(port);
            }
        } else if connection.is_closed() {
            self.remove(port);
        }
    }

    fn remove(&mut self, port: u32) {
        if let (Some(gone), Some(listener)) = (self.connections.remove(&port), &self.listener) {
            listener.poller.forget(gone.stream());
        }
        self.turns.retain(|other| *other != port);
    }

    /// Takes what the guest sends.
    fn receive(&mut self, queues: &mut Queues) {
        self.held = false;
        loop {
            if self.answers.len() >= ANSWERS_MAX {
                self.held = true;
                return;
            }
            let Some(chain) = queues.next(TX) else { return };
            let head = chain.head_index();
            self.receive_one(chain, queues);
            queues.push(TX, head, 0);
        }
    }

    fn receive_one(&mut self, chain: Chain, queues: &Queues) {
        let Ok(mut buffers) = chain.reader(queues.memory().as_ref()) else {
            return;
        };
        let packet = match Packet::parse(&mut buffers, self.cid) {
            Ok(packet) => packet,
            Err(Refused::Malformed) => return,
            Err(Refused::Unwanted(guest_port, host_port)) => {
                return self.answers.push_back(reset(guest_port, host_port));
            }
        };
        self.data.resize(packet.len as usize, 0);
        if buffers.read_exact(&mut self.data).is_err() {
            return;
        }
        let port = packet.host_port;
        match self.connections.get_mut(&port) {
            Some(connection) if connection.is_from(packet.guest_port) => {
                connection.receive(&packet, &self.data);
                self.after(port);
            }
            _ if packet.op == Op::Reset => {}
            // Nobody of the host serves ports, and what is not known is gone.
            _ => self
                .answers
                .push_back(reset(packet.guest_port, packet.host_port)),
        }
    }

    /// Gives the guest what there is for it, as long as it has buffers.
    fn send(&mut self, queues: &mut Queues) {
        while !self.answers.is_empty() || !self.turns.is_empty() {
            let Some(chain) = queues.next(RX) else { return };
            let head = chain.head_index();
            let room: usize = chain
                .clone()
                .writable()
                .map(|part| part.len() as usize)
                .sum();
            let Some(room) = room.checked_sub(HEADER_LEN) else {
                queues.push(RX, head, 0);
                continue;
            };
            let Some(packet) = self.next_packet(room) else {
                queues.undo_pop(RX);
                return;
            };
            let written = self.write(&packet, chain, queues);
            queues.push(RX, head, written);
        }
    }

    fn write(&self, packet: &Packet, chain: Chain, queues: &Queues) -> u32 {
        let Ok(mut buffers) = chain.writer(queues.memory().as_ref()) else {
            return 0;
        };
        let data = &self.data[..packet.len as usize];
        let done = packet
            .write(&mut buffers, self.cid)
            .and_then(|()| buffers.write_all(data));
        if done.is_ok() {
            HEADER_LEN as u32 + packet.len
        } else {
            0
        }
    }

    /// The next packet for the guest; its data is in `self.data`.
    fn next_packet(&mut self, room: usize) -> Option<Packet> {
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        while let Some(port) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&port) else {
                continue;
            };
            let packet = connection.next(room.min(DATA_MAX), &mut self.data);
            self.after(port);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// Tells the guest that its connections are gone, and goes on once it has acted on it.
    fn announce(&mut self, queues: &mut Queues) {
        if self.reset == Reset::Due {
            self.tell(queues);
        }
        if let Reset::Told(mark) = self.reset
            && queues.mark(EVENT).is_some_and(|now| now != mark)
        {
            self.reset = Reset::Done;
            self.accept();
            self.send(queues);
        }
    }

    fn tell(&mut self, queues: &mut Queues) {
        let Some(chain) = queues.next(EVENT) else {
            return;
        };
        // Before it can act: nothing it adds in answer goes unnoticed.
        let mark = queues.listen_beyond(EVENT);
        let head = chain.head_index();
        let written = chain
            .writer(queues.memory().as_ref())
            .ok()
            .and_then(|mut buffer| buffer.write_all(&TRANSPORT_RESET.to_le_bytes()).ok())
            .map_or(0, |()| 4);
        if let (4, Some(mark)) = (written, mark) {
            self.reset = Reset::Told(mark);
        }
        queues.push(EVENT, head, written);
    }
}

fn following(port: u32) -> u32 {
    port.checked_add(1)
        .filter(|port| *port < u32::MAX)
        .unwrap_or(FIRST_PORT)
}

fn reset(guest_port: u32, host_port: u32) -> Packet {
    Packet {
        guest_port,
        host_port,
        op: Op::Reset,
        flags: 0,
        len: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        kind::VSOCK
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        let ports: Vec<u32> = self.connections.keys().copied().collect();
        for port in ports {
            self.remove(port);
        }
        self.answers.clear();
        self.held = false;
        self.reset = Reset::Done;
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn process(&mut self, queue: usize, queues: &mut Queues) {
        match queue {
            TX => {
                self.receive(queues);
                self.send(queues);
            }
            EVENT => self.announce(queues),
            _ => {
                self.send(queues);
                if self.held {
                    self.receive(queues);
                    self.send(queues);
                }
            }
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.listener
            .as_ref()
            .map(|listener| listener.poller.as_fd())
    }

    fn ready(&mut self, queues: &mut Queues) {
        let Some(listener) = &self.listener else {
            return;
        };
        for token in listener.poller.take() {
            match u32::try_from(token) {
                Ok(port) => {
                    if let Some(connection) = self.connections.get_mut(&port) {
                        connection.host_ready();
                        self.after(port);
                    }
                }
                Err(_) => self.accept(),
            }
        }
        self.send(queues);
    }
}
