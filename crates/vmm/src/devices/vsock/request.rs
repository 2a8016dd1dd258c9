//! Packets: the header of 44 bytes, parsed and written.

use std::io::{Read as _, Write as _};

use virtio_queue::{Reader, Writer};

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// Most bytes of data in one packet, in both directions.
pub const DATA_MAX: usize = 64 << 10;
/// The address of the host.
pub const HOST_CID: u64 = 2;
const TYPE_STREAM: u16 = 1;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Open a connection.
    Request,
    /// Accept it.
    Response,
    /// Refuse or end it at once.
    Reset,
    /// Announce that nothing more will be sent or received.
    Shutdown,
    /// Data.
    Data,
    /// Tell how much room there is.
    CreditUpdate,
    /// Ask how much room there is.
    CreditRequest,
}

impl Op {
    fn parse(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// In [`Op::Shutdown`]: the sender will receive nothing more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// In [`Op::Shutdown`]: the sender will send nothing more.
pub const SHUTDOWN_SEND: u32 = 2;

/// A packet without its data. The guest's port and the host's name the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Guest's port.
    pub guest_port: u32,
    /// Host's port.
    pub host_port: u32,
    /// What it is for.
    pub op: Op,
    /// `SHUTDOWN_*`.
    pub flags: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// The sender's room for data in all.
    pub buf_alloc: u32,
    /// Bytes of data the sender has passed on, modulo 2^32.
    pub fwd_cnt: u32,
}

/// What is wrong with a packet of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Too short or inconsistent: nobody could answer it.
    Malformed,
    /// Well-formed but not ours: answered with a reset of these ports (guest's, host's).
    Unwanted(u32, u32),
}

impl Packet {
    /// Parses a packet the guest `cid` sends; `packet` is left at its data.
    pub fn parse(packet: &mut Reader<'_>, cid: u64) -> Result<Self, Refused> {
        let mut bytes = [0; HEADER_LEN];
        packet
            .read_exact(&mut bytes)
            .map_err(|_| Refused::Malformed)?;
        let u32_at = |at: usize| u32::from_le_bytes(array(&bytes, at));
        let u64_at = |at: usize| u64::from_le_bytes(array(&bytes, at));
        let u16_at = |at: usize| u16::from_le_bytes(array(&bytes, at));
        let (guest_port, host_port, len) = (u32_at(16), u32_at(20), u32_at(24));
        if u64_at(0) != cid || packet.available_bytes() < len as usize || len as usize > DATA_MAX {
            return Err(Refused::Malformed);
        }
        let unwanted = Refused::Unwanted(guest_port, host_port);
        if u64_at(8) != HOST_CID || u16_at(28) != TYPE_STREAM {
            return Err(unwanted);
        }
        let op = Op::parse(u16_at(30)).ok_or(unwanted)?;
        if (op == Op::Data) != (len > 0) {
            return Err(unwanted);
        }
        let (flags, buf_alloc, fwd_cnt) = (u32_at(32), u32_at(36), u32_at(40));
        Ok(Self {
            guest_port,
            host_port,
            op,
            flags,
            len,
            buf_alloc,
            fwd_cnt,
        })
    }

    /// Writes the header of a packet for the guest `cid`.
    pub fn write(&self, to: &mut Writer<'_>, cid: u64) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend(HOST_CID.to_le_bytes());
        bytes.extend(cid.to_le_bytes());
        bytes.extend(self.host_port.to_le_bytes());
        bytes.extend(self.guest_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(TYPE_STREAM.to_le_bytes());
        bytes.extend(self.op.code().to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        to.write_all(&bytes)
    }
}

fn array<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("fields lie inside the header")
}
