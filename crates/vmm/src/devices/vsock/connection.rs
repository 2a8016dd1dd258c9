//! One stream: a unix socket on the host's side, a port of the guest on the other.
//!
//! ```text
//!   Greeting ──"CONNECT n"──► Requested ──response──► Open ──both sides done──► Closed
//!      └──────────────── garbage, refusal, reset, a broken stream ───────────────►┘
//! ```
//!
//! Knows nothing of queues: packets come in and go out as values. Room is bounded on both sides by
//! credit: the guest may have [`BUFFER`] bytes on the way to the host, and never gets more than it
//! said it has room for.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use super::request::{DATA_MAX, Op, Packet, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Room for data from the guest that the host has not read.
pub const BUFFER: u32 = 256 << 10;
/// Longest greeting, `CONNECT 4294967295\n`.
const GREETING_MAX: usize = 19;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Requested,
    Open,
    Closed,
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    phase: Phase,
    guest_port: u32,
    host_port: u32,
    greeting: Vec<u8>,
    /// What the guest said about its room.
    peer_room: u32,
    peer_passed: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// Data from the guest that the host has not taken.
    backlog: VecDeque<u8>,
    passed: Wrapping<u32>,
    passed_told: Wrapping<u32>,
    /// The stream may have something to read; it is asked until it says no.
    readable: bool,
    credit_asked: bool,
    /// The guest forgot the connection, but data it sent before still waits for the host.
    guest_gone: bool,
    host_done: bool,
    guest_done: bool,
    shutdown_sent: bool,
    outgoing: VecDeque<Op>,
}

impl Connection {
    /// A stream that has just been accepted, non-blocking.
    pub fn new(stream: UnixStream, host_port: u32) -> Self {
        Self {
            stream,
            phase: Phase::Greeting,
            guest_port: 0,
            host_port,
            greeting: Vec::new(),
            peer_room: 0,
            peer_passed: Wrapping(0),
            sent: Wrapping(0),
            backlog: VecDeque::new(),
            passed: Wrapping(0),
            passed_told: Wrapping(0),
            readable: true,
            credit_asked: false,
            guest_gone: false,
            host_done: false,
            guest_done: false,
            shutdown_sent: false,
            outgoing: VecDeque::new(),
        }
    }

    /// The host's side.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether nothing more will come of it; what [`Connection::next`] still returns is sent first.
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Whether a packet of these ports belongs to this connection.
    pub fn is_from(&self, guest_port: u32) -> bool {
        self.phase != Phase::Greeting && self.guest_port == guest_port
    }

    /// The host's side may have changed.
    pub fn host_ready(&mut self) {
        self.readable = true;
        if self.phase == Phase::Greeting {
            self.greet();
        }
        self.flush();
    }

    /// The line that names the port, byte by byte so that nothing after it is taken.
    fn greet(&mut self) {
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) if self.greeting.len() < GREETING_MAX => self.greeting.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return self.close(),
            }
        }
        let line = std::str::from_utf8(&self.greeting).unwrap_or_default();
        let port = line
            .strip_prefix("CONNECT ")
            .and_then(|port| port.trim_end().parse().ok());
        match port {
            Some(port) => {
                self.guest_port = port;
                self.phase = Phase::Requested;
                self.outgoing.push_back(Op::Request);
            }
            None => self.close(),
        }
    }

    /// A packet of the guest, with its data.
    pub fn receive(&mut self, packet: &Packet, data: &[u8]) {
        self.peer_room = packet.buf_alloc;
        self.peer_passed = Wrapping(packet.fwd_cnt);
        if self.credit() > 0 {
            self.credit_asked = false;
        }
        match packet.op {
            Op::Response if self.phase == Phase::Requested => self.accepted(),
            Op::Data if self.phase == Phase::Open => self.take(data),
            Op::Shutdown if self.phase == Phase::Open => self.guest_shutdown(packet.flags),
            Op::CreditUpdate => {}
            Op::CreditRequest => self.outgoing.push_back(Op::CreditUpdate),
            Op::Reset if self.guest_done && !self.backlog.is_empty() => self.guest_gone = true,
            Op::Reset => self.close(),
            Op::Request | Op::Response | Op::Data | Op::Shutdown => self.abort(),
        }
    }

    fn accepted(&mut self) {
        self.phase = Phase::Open;
        let answer = format!("OK {}\n", self.host_port);
        if self.stream.write_all(answer.as_bytes()).is_err() {
            self.abort();
        }
    }

    fn take(&mut self, data: &[u8]) {
        if self.guest_done || self.backlog.len() + data.len() > BUFFER as usize {
            // It said that it was done, or sent more than there is room for.
            return self.abort();
        }
        self.backlog.extend(data);
        self.flush();
    }

    fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.host_done = true;
            self.shutdown_sent = true;
            self.stream.shutdown(Shutdown::Read).ok();
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_done = true;
        }
        self.flush();
    }

    /// Writes what waits for the host.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (first, _) = self.backlog.as_slices();
            match self.stream.write(first) {
                Ok(written) if written > 0 => {
                    self.backlog.drain(..written);
                    self.passed += written as u32;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return self.abort(),
            }
        }
        // The guest is told before it has to ask.
        if (self.passed - self.passed_told).0 >= BUFFER / 2
            && !self.outgoing.contains(&Op::CreditUpdate)
        {
            self.outgoing.push_back(Op::CreditUpdate);
        }
        if self.guest_done && self.backlog.is_empty() {
            self.stream.shutdown(Shutdown::Write).ok();
            if self.guest_gone {
                self.close();
            } else if self.host_done && self.phase == Phase::Open {
                self.abort();
            }
        }
    }

    /// Both sides hear that it is over.
    fn abort(&mut self) {
        self.outgoing.clear();
        if !matches!(self.phase, Phase::Closed | Phase::Greeting) && !self.guest_gone {
            self.outgoing.push_back(Op::Reset);
        }
        self.close();
    }

    fn close(&mut self) {
        self.phase = Phase::Closed;
        self.backlog.clear();
        self.stream.shutdown(Shutdown::Both).ok();
    }

    /// Whether [`Connection::next`] might return something.
    pub fn has_output(&self) -> bool {
        let may_ask = self.credit() > 0 || !self.credit_asked;
        !self.outgoing.is_empty() || (self.may_read() && may_ask)
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host_done && !self.guest_gone
    }

    /// Bytes the guest has room for. None for one that takes back what it promised.
    fn credit(&self) -> u32 {
        self.peer_room
            .saturating_sub((self.sent - self.peer_passed).0)
    }

    /// The next packet for the guest, whose buffer holds `room` bytes of data after the header. Data
    /// is put into `data`.
    pub fn next(&mut self, room: usize, data: &mut Vec<u8>) -> Option<Packet> {
        data.clear();
        if let Some(op) = self.outgoing.pop_front() {
            return Some(self.packet(op, 0, 0));
        }
        if !self.may_read() {
            return None;
        }
        let credit = self.credit() as usize;
        if credit == 0 {
            let asked = std::mem::replace(&mut self.credit_asked, true);
            return (!asked).then(|| self.packet(Op::CreditRequest, 0, 0));
        }
        match room.min(credit).min(DATA_MAX) {
            0 => None,
            len => self.read(len, data),
        }
    }

    fn read(&mut self, len: usize, data: &mut Vec<u8>) -> Option<Packet> {
        data.resize(len, 0);
        loop {
            match self.stream.read(data) {
                Ok(0) => return self.host_ended(),
                Ok(read) => {
                    data.truncate(read);
                    self.sent += read as u32;
                    return Some(self.packet(Op::Data, 0, read as u32));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    data.clear();
                    self.readable = false;
                    return None;
                }
                Err(_) => {
                    data.clear();
                    self.abort();
                    return self.outgoing.pop_front().map(|op| self.packet(op, 0, 0));
                }
            }
        }
    }

    fn host_ended(&mut self) -> Option<Packet> {
        self.host_done = true;
        if self.guest_done && self.backlog.is_empty() {
            self.abort();
            return self.outgoing.pop_front().map(|op| self.packet(op, 0, 0));
        }
        if std::mem::replace(&mut self.shutdown_sent, true) {
            return None;
        }
        Some(self.packet(Op::Shutdown, SHUTDOWN_SEND, 0))
    }

    fn packet(&mut self, op: Op, flags: u32, len: u32) -> Packet {
        self.passed_told = self.passed;
        Packet {
            guest_port: self.guest_port,
            host_port: self.host_port,
            op,
            flags,
            len,
            buf_alloc: BUFFER,
            fwd_cnt: self.passed.0,
        }
    }
}
