//! Bytes in, bytes out, for the control messages. Knows no message.

use super::Failure;

/// Why a packet is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The packet ends inside a field.
    #[error("control message ends after {0} bytes, inside a field")]
    Short(usize),
    /// Bytes follow the last field.
    #[error("control message has {0} bytes too many")]
    Trailing(usize),
    /// The other end speaks another version.
    #[error("control message has protocol version {0}: both programs must be of one release")]
    Version(u8),
    /// No such kind of message.
    #[error("control message of unknown kind {0}")]
    Kind(u8),
    /// A string is not UTF-8.
    #[error("control message holds a string that is not UTF-8")]
    Utf8,
    /// A field holds what it must not.
    #[error("control message: {field} is {value}, which is not allowed")]
    Value {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
}

/// Longest string; longer ones are cut at a character when they are written.
const STRING_MAX: usize = 4096;

pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn new(version: u8) -> Writer {
        let mut bytes = Vec::with_capacity(64);
        bytes.push(version);
        Writer(bytes)
    }

    pub(super) fn start(&mut self, kind: u8, seq: u32) -> &mut Writer {
        self.u8(kind).u32(seq)
    }

    pub(super) fn u8(&mut self, value: u8) -> &mut Writer {
        self.bytes(&[value])
    }

    pub(super) fn bool(&mut self, value: bool) -> &mut Writer {
        self.u8(u8::from(value))
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Writer {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Writer {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Writer {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn str(&mut self, value: &str) -> &mut Writer {
        let cut = value.floor_char_boundary(STRING_MAX);
        self.u16(cut as u16).bytes(&value.as_bytes()[..cut])
    }

    pub(super) fn failure(&mut self, failure: &Failure) -> &mut Writer {
        // A reply may hold dozens of failures: each is cut short enough for all to fit.
        let cut = failure.message.floor_char_boundary(512);
        self.u32(failure.errno).str(&failure.message[..cut])
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Writer {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }
}

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn start(bytes: &'a [u8], version: u8) -> Result<(Reader<'a>, u8, u32), Error> {
        let mut reader = Reader { bytes, at: 0 };
        let found = reader.u8()?;
        if found != version {
            return Err(Error::Version(found));
        }
        let kind = reader.u8()?;
        let seq = reader.u32()?;
        Ok((reader, kind, seq))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Error> {
        let end = self
            .at
            .checked_add(len)
            .ok_or(Error::Short(self.bytes.len()))?;
        let taken = self
            .bytes
            .get(self.at..end)
            .ok_or(Error::Short(self.bytes.len()))?;
        self.at = end;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Error> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(super) fn bool(&mut self) -> Result<bool, Error> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(Error::Value {
                field: "flag",
                value: u64::from(value),
            }),
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16, Error> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn str(&mut self) -> Result<String, Error> {
        let len = usize::from(self.u16()?);
        if len > STRING_MAX {
            return Err(Error::Value {
                field: "string length",
                value: len as u64,
            });
        }
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| Error::Utf8)?;
        Ok(text.to_owned())
    }

    pub(super) fn failure(&mut self) -> Result<Failure, Error> {
        Ok(Failure {
            errno: self.u32()?,
            message: self.str()?,
        })
    }

    pub(super) fn finish(self) -> Result<(), Error> {
        match self.bytes.len() - self.at {
            0 => Ok(()),
            left => Err(Error::Trailing(left)),
        }
    }
}
