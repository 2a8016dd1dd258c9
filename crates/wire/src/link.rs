//! Connections over one byte stream that never closes.
//!
//! A virtio-serial port is a single stream that outlives whoever talks over it: it may be frozen in
//! the middle of a message and go on in a fork, with a new host at the other end. So what crosses
//! it is framed in a way that can be picked up anywhere:
//!
//! ```text
//!   0x00 | COBS( id u64 LE | kind u8 | payload ≤ 8 KiB | checksum u32 LE ) | 0x00 | …
//! ```
//!
//! COBS leaves no zero byte inside a frame, so a zero always ends one. The host chooses a random id
//! for every connection and begins it with a bare zero and an [`Kind::Open`] frame. Whoever receives
//! a frame of another id, or a damaged one, drops it and goes on after the next zero; an `Open` of a
//! new id makes the agent drop the connection before. There are no acknowledgements: the HTTP/2
//! above has its own flow control.
//!
//! No I/O here: bytes in, frames out, and back.

use memchr::memchr;

#[cfg(test)]
mod tests;

/// The most payload one frame carries, bytes.
pub const MAX_PAYLOAD: usize = 8 * 1024;

/// Ends every frame.
pub const DELIMITER: u8 = 0;

const HEADER: usize = 9;
const CHECKSUM: usize = 4;
const MAX_RAW: usize = HEADER + MAX_PAYLOAD + CHECKSUM;
/// COBS adds one byte for every 254, and one.
const MAX_ENCODED: usize = MAX_RAW + MAX_RAW / 254 + 2;
/// The longest run that one COBS code byte covers.
const MAX_RUN: usize = 254;

/// The most bytes one encoded frame takes, with its delimiter.
pub const MAX_FRAME: usize = MAX_ENCODED + 1;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A connection begins; whatever was before it is over.
    Open,
    /// Bytes of the connection.
    Data,
    /// The connection ends.
    Close,
}

impl Kind {
    fn to_byte(self) -> u8 {
        match self {
            Self::Open => 1,
            Self::Data => 2,
            Self::Close => 3,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Open),
            2 => Some(Self::Data),
            3 => Some(Self::Close),
            _ => None,
        }
    }
}

/// One frame, as it came out of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The connection it belongs to.
    pub id: u64,
    /// What it is for.
    pub kind: Kind,
    /// Its bytes; only [`Kind::Data`] has any.
    pub payload: &'a [u8],
}

/// Turns frames of one connection into bytes.
#[derive(Debug, Clone)]
pub struct Encoder {
    id: u64,
}

impl Encoder {
    /// An encoder for the connection `id`.
    pub fn new(id: u64) -> Self {
        Self { id }
    }

    /// Appends what begins the connection: a zero to end whatever was cut off before, and `Open`.
    pub fn open(&self, out: &mut Vec<u8>) {
        out.push(DELIMITER);
        self.frame(Kind::Open, &[], out);
    }

    /// Appends as much of `payload` as one frame carries, and says how much that was.
    pub fn data(&self, payload: &[u8], out: &mut Vec<u8>) -> usize {
        let taken = payload.len().min(MAX_PAYLOAD);
        self.frame(Kind::Data, &payload[..taken], out);
        taken
    }

    /// Appends what ends the connection.
    pub fn close(&self, out: &mut Vec<u8>) {
        self.frame(Kind::Close, &[], out);
    }

    fn frame(&self, kind: Kind, payload: &[u8], out: &mut Vec<u8>) {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&self.id.to_le_bytes());
        header[8] = kind.to_byte();
        let sum = checksum(&header, payload).to_le_bytes();
        out.reserve(HEADER + payload.len() + payload.len() / MAX_RUN + CHECKSUM + 4);
        let mut cobs = Cobs::begin(out);
        cobs.push(&header);
        cobs.push(payload);
        cobs.push(&sum);
        cobs.end();
    }
}

/// Writes one COBS frame run by run.
struct Cobs<'a> {
    out: &'a mut Vec<u8>,
    /// Where the code byte of the current run stands.
    code_at: usize,
}

impl<'a> Cobs<'a> {
    fn begin(out: &'a mut Vec<u8>) -> Self {
        let code_at = out.len();
        out.push(0);
        Self { out, code_at }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = MAX_RUN - self.run();
            let window = &bytes[..bytes.len().min(room)];
            match memchr(0, window) {
                Some(zero) => {
                    self.out.extend_from_slice(&window[..zero]);
                    bytes = &bytes[zero + 1..];
                    self.next_run();
                }
                None => {
                    self.out.extend_from_slice(window);
                    bytes = &bytes[window.len()..];
                    if self.run() == MAX_RUN {
                        self.next_run();
                    }
                }
            }
        }
    }

    fn run(&self) -> usize {
        self.out.len() - self.code_at - 1
    }

    fn set_code(&mut self) {
        // A run is at most 254 long, so its code fits a byte.
        self.out[self.code_at] = (self.run() + 1) as u8;
    }

    fn next_run(&mut self) {
        self.set_code();
        self.code_at = self.out.len();
        self.out.push(0);
    }

    fn end(mut self) {
        self.set_code();
        self.out.push(DELIMITER);
    }
}

/// Finds frames in a stream of bytes, however it is cut.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The encoded bytes of the frame that is coming in; decoded in place when it is whole.
    buf: Vec<u8>,
    /// The frame is longer than any can be; drop everything up to its end.
    skipping: bool,
    /// `buf` holds a frame that was handed out already.
    taken: bool,
    damaged: u64,
}

impl Decoder {
    /// A decoder at the beginning of a stream, or anywhere in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many frames were dropped because they were damaged. Padding zeros do not count.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Takes bytes off the front of `input` until a frame is whole or nothing is left.
    pub fn next<'a>(&'a mut self, input: &mut &[u8]) -> Option<Frame<'a>> {
        loop {
            if self.taken {
                self.buf.clear();
                self.taken = false;
            }
            let Some(end) = memchr(DELIMITER, input) else {
                self.keep(input);
                *input = &[];
                return None;
            };
            self.keep(&input[..end]);
            *input = &input[end + 1..];
            self.taken = true;
            if std::mem::take(&mut self.skipping) {
                self.damaged += 1;
                continue;
            }
            if self.buf.is_empty() {
                continue;
            }
            match decode(&mut self.buf) {
                Some((id, kind, payload)) => {
                    return Some(Frame {
                        id,
                        kind,
                        payload: &self.buf[payload],
                    });
                }
                None => self.damaged += 1,
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.skipping || self.buf.len() + bytes.len() > MAX_ENCODED {
            self.skipping = true;
            self.buf.clear();
        } else {
            self.buf.extend_from_slice(bytes);
        }
    }
}

/// Undoes COBS in place and checks what comes out.
fn decode(buf: &mut [u8]) -> Option<(u64, Kind, std::ops::Range<usize>)> {
    let (mut read, mut written) = (0, 0);
    while read < buf.len() {
        let code = usize::from(buf[read]);
        let run = code.checked_sub(1)?;
        read += 1;
        if read + run > buf.len() {
            return None;
        }
        buf.copy_within(read..read + run, written);
        read += run;
        written += run;
        if code <= MAX_RUN && read < buf.len() {
            buf[written] = 0;
            written += 1;
        }
    }
    let payload_end = written.checked_sub(CHECKSUM).filter(|end| *end >= HEADER)?;
    let (header, payload) = buf[..payload_end].split_at(HEADER);
    let sum = u32::from_le_bytes(buf[payload_end..written].try_into().ok()?);
    if payload.len() > MAX_PAYLOAD || sum != checksum(header, payload) {
        return None;
    }
    let id = u64::from_le_bytes(header[..8].try_into().ok()?);
    Some((id, Kind::from_byte(header[8])?, HEADER..payload_end))
}

/// Tells a damaged frame from a whole one. It guards against accidents, not against anybody, and
/// takes eight bytes a step, because it also runs on emulated processors.
fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut sum = 0x9e37_79b9_7f4a_7c15 ^ (payload.len() as u64);
    for part in [header, payload] {
        let (words, rest) = part.as_chunks::<8>();
        for word in words {
            sum = mix(sum, u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        sum = mix(sum, u64::from_le_bytes(last));
    }
    (sum ^ (sum >> 32)) as u32
}

fn mix(sum: u64, word: u64) -> u64 {
    (sum.rotate_left(23) ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd)
}
