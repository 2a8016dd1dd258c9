//! Kernel structures as tagged bytes: tag u16, reserved u16, length u32, bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::file::Error;

/// Appends one field.
pub(super) fn put(out: &mut Vec<u8>, tag: u16, bytes: &[u8]) {
    out.extend_from_slice(&tag.to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// The fields of a section, read in the order they were written.
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
    section: &'static str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8], section: &'static str) -> Fields<'a> {
        Fields { bytes, section }
    }

    fn damaged(&self, tag: u16) -> Error {
        Error::Field {
            section: self.section,
            field: tag,
        }
    }

    /// The bytes of the next field, which must be `tag`.
    pub(super) fn raw(&mut self, tag: u16) -> Result<&'a [u8], Error> {
        let damaged = self.damaged(tag);
        let (head, rest) = self
            .bytes
            .split_at_checked(8)
            .ok_or_else(|| damaged.clone())?;
        let found = u16::from_le_bytes([head[0], head[1]]);
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let (value, rest) = rest.split_at_checked(len).ok_or_else(|| damaged.clone())?;
        if found != tag || head[2..4] != [0, 0] {
            return Err(damaged);
        }
        self.bytes = rest;
        Ok(value)
    }

    /// The next field as one structure, of exactly its size.
    pub(super) fn one<T: FromBytes + Immutable>(&mut self, tag: u16) -> Result<T, Error> {
        let raw = self.raw(tag)?;
        T::read_from_bytes(raw).map_err(|_| self.damaged(tag))
    }

    /// The next field as an array, of at most `max` elements.
    pub(super) fn many<T>(&mut self, tag: u16, max: usize) -> Result<Vec<T>, Error>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        let raw = self.raw(tag)?;
        if !raw.len().is_multiple_of(size_of::<T>()) || raw.len() / size_of::<T>() > max {
            return Err(self.damaged(tag));
        }
        let read = |bytes| T::read_from_bytes(bytes).map_err(|_| self.damaged(tag));
        raw.chunks_exact(size_of::<T>()).map(read).collect()
    }

    /// There must be nothing left.
    pub(super) fn finish(self) -> Result<(), Error> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(self.damaged(0))
        }
    }
}
