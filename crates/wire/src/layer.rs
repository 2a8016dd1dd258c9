//! The index of a memory layer: which parts of a guest's RAM differ from what lies below, and which of
//! those are zero. The pages themselves stand in a sparse file beside it, at their own guest offset.
//! An index is needed because a hole in that file cannot say whether a page is zero or unchanged.
//!
//! ```text
//!   offset  size  field                                  all numbers little-endian
//!        0     8  magic "FKDLAYER"
//!        8     4  format version, 1
//!       12     4  page size, 4096
//!       16     8  bytes of guest RAM
//!       24     8  number of extents, n
//!       32  24*n  extents: offset u64, length u64, kind u32 (0 data, 1 zero), reserved u32 (0)
//!  32+24*n    32  blake3 of everything before it
//! ```
//!
//! Extents are whole pages, ascending, apart from each other; two of the same kind never touch. So
//! equal indexes have equal bytes. Decoding refuses everything else and never panics: an index comes
//! from a disk or an archive. No I/O here.

use std::ops::Range;

/// The first bytes of an index.
pub const MAGIC: [u8; 8] = *b"FKDLAYER";
/// The version of the format that this code writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes in a page; extents are multiples of it.
pub const PAGE_SIZE: u64 = 4096;
/// Most bytes of guest RAM an index may describe: 1 TiB, four times the largest guest.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

const HEADER_LEN: usize = 32;
const EXTENT_LEN: usize = 24;
const HASH_LEN: usize = blake3::OUT_LEN;

const KIND_DATA: u32 = 0;
const KIND_ZERO: u32 = 1;

/// Why bytes are no index, or why an extent does not fit into one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The number of bytes is not what the header says, or too few for a header.
    #[error("layer index has {found} bytes, expected {expected}")]
    Length {
        /// Bytes there should be; a lower bound where even the header is incomplete.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The bytes do not begin like an index.
    #[error("not a layer index: it begins with {found:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// Another version of the format.
    #[error("layer index has format version {found}, this program reads version {FORMAT_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Another page size.
    #[error("layer index is for pages of {found} bytes, this program reads pages of {PAGE_SIZE}")]
    PageSize {
        /// The page size found.
        found: u32,
    },
    /// The size of RAM is zero, no multiple of the page size, or beyond [`MEMORY_BYTES_MAX`].
    #[error("layer index describes {found} bytes of memory, which no guest has")]
    MemorySize {
        /// The size found.
        found: u64,
    },
    /// More extents than pages.
    #[error("layer index claims {found} extents, memory has only {pages} pages")]
    Count {
        /// The number of extents claimed.
        found: u64,
        /// Pages of guest RAM.
        pages: u64,
    },
    /// The checksum does not match the contents.
    #[error("layer index is damaged: its checksum does not match")]
    Checksum,
    /// An extent is empty, unaligned, outside memory, or of an unknown kind.
    #[error("layer extent at {offset} of {len} bytes and kind {kind} is invalid")]
    Extent {
        /// Offset in guest RAM.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The kind's number.
        kind: u32,
    },
    /// An extent begins before the one before it ends, or touches one of its own kind.
    #[error("layer extent at {offset} does not follow the one that ends at {previous_end}")]
    Order {
        /// Offset in guest RAM.
        offset: u64,
        /// End of the extent before.
        previous_end: u64,
    },
}

/// What an extent holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The layer's file holds the pages.
    Data,
    /// The pages are zero; the layer's file has a hole there.
    Zero,
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Kind::Data => KIND_DATA,
            Kind::Zero => KIND_ZERO,
        }
    }

    fn from_number(number: u32) -> Option<Kind> {
        match number {
            KIND_DATA => Some(Kind::Data),
            KIND_ZERO => Some(Kind::Zero),
            _ => None,
        }
    }
}

/// A run of pages that differ from what lies below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Offset in guest RAM, in bytes.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What the pages hold.
    pub kind: Kind,
}

impl Extent {
    /// The first byte after the extent.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The extent's bytes in guest RAM.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.end()
    }
}

/// A valid index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    memory_bytes: u64,
    extents: Vec<Extent>,
}

impl Index {
    /// Bytes of guest RAM.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// The extents, ascending and apart.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Bytes of pages that the layer's file holds.
    pub fn data_bytes(&self) -> u64 {
        self.bytes_of(Kind::Data)
    }

    /// Bytes of pages that became zero.
    pub fn zero_bytes(&self) -> u64 {
        self.bytes_of(Kind::Zero)
    }

    fn bytes_of(&self, kind: Kind) -> u64 {
        let of_kind = self.extents.iter().filter(|extent| extent.kind == kind);
        of_kind.map(|extent| extent.len).sum()
    }

    /// The most bytes that the index of a guest with this much RAM can have; a bound for readers.
    pub fn encoded_len_max(memory_bytes: u64) -> u64 {
        let pages = memory_bytes / PAGE_SIZE;
        pages
            .saturating_mul(EXTENT_LEN as u64)
            .saturating_add((HEADER_LEN + HASH_LEN) as u64)
    }

    /// The index as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let len = HEADER_LEN + self.extents.len() * EXTENT_LEN + HASH_LEN;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        bytes.extend_from_slice(&self.memory_bytes.to_le_bytes());
        bytes.extend_from_slice(&(self.extents.len() as u64).to_le_bytes());
        for extent in &self.extents {
            bytes.extend_from_slice(&extent.offset.to_le_bytes());
            bytes.extend_from_slice(&extent.len.to_le_bytes());
            bytes.extend_from_slice(&extent.kind.number().to_le_bytes());
            bytes.extend_from_slice(&0u32.to_le_bytes());
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    /// Reads an index, refusing whatever [`Index::encode`] could not have written.
    pub fn decode(bytes: &[u8]) -> Result<Index, Error> {
        let (memory_bytes, count) = decode_header(bytes)?;
        let (contents, hash) = bytes.split_at(bytes.len() - HASH_LEN);
        if blake3::hash(contents).as_bytes().as_slice() != hash {
            return Err(Error::Checksum);
        }
        let mut extents: Vec<Extent> = Vec::with_capacity(count);
        for record in contents[HEADER_LEN..].chunks_exact(EXTENT_LEN) {
            let extent = decode_extent(record, memory_bytes)?;
            if let Some(previous) = extents.last() {
                let touches = extent.offset == previous.end() && extent.kind == previous.kind;
                if extent.offset < previous.end() || touches {
                    return Err(Error::Order {
                        offset: extent.offset,
                        previous_end: previous.end(),
                    });
                }
            }
            extents.push(extent);
        }
        Ok(Index {
            memory_bytes,
            extents,
        })
    }
}

/// Checks the header against the number of bytes there are; answers size of RAM and number of extents.
fn decode_header(bytes: &[u8]) -> Result<(u64, usize), Error> {
    let found = bytes.len() as u64;
    let least = (HEADER_LEN + HASH_LEN) as u64;
    if found < least {
        return Err(Error::Length {
            expected: least,
            found,
        });
    }
    let magic: [u8; 8] = array(bytes, 0);
    if magic != MAGIC {
        return Err(Error::Magic { found: magic });
    }
    let version = u32_at(bytes, 8);
    if version != FORMAT_VERSION {
        return Err(Error::Version { found: version });
    }
    let page_size = u32_at(bytes, 12);
    if u64::from(page_size) != PAGE_SIZE {
        return Err(Error::PageSize { found: page_size });
    }
    let memory_bytes = u64_at(bytes, 16);
    check_memory_bytes(memory_bytes)?;
    let count = u64_at(bytes, 24);
    let pages = memory_bytes / PAGE_SIZE;
    if count > pages {
        return Err(Error::Count {
            found: count,
            pages,
        });
    }
    // At most 2^28 extents: no overflow.
    let expected = least + count * EXTENT_LEN as u64;
    if found != expected {
        return Err(Error::Length { expected, found });
    }
    Ok((memory_bytes, count as usize))
}

fn decode_extent(record: &[u8], memory_bytes: u64) -> Result<Extent, Error> {
    let (offset, len) = (u64_at(record, 0), u64_at(record, 8));
    let (kind, reserved) = (u32_at(record, 16), u32_at(record, 20));
    let invalid = Error::Extent { offset, len, kind };
    match Kind::from_number(kind) {
        Some(kind) if reserved == 0 && fits(offset, len, memory_bytes) => {
            Ok(Extent { offset, len, kind })
        }
        _ => Err(invalid),
    }
}

fn fits(offset: u64, len: u64, memory_bytes: u64) -> bool {
    let whole_pages = offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
    let end = offset.checked_add(len);
    len > 0 && whole_pages && end.is_some_and(|end| end <= memory_bytes)
}

fn check_memory_bytes(memory_bytes: u64) -> Result<(), Error> {
    let whole_pages = memory_bytes.is_multiple_of(PAGE_SIZE);
    if memory_bytes == 0 || !whole_pages || memory_bytes > MEMORY_BYTES_MAX {
        return Err(Error::MemorySize {
            found: memory_bytes,
        });
    }
    Ok(())
}

/// Copies `N` bytes; the callers have checked that they are there.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// Collects extents in ascending order and joins those that touch.
#[derive(Debug, Clone)]
pub struct Builder {
    index: Index,
}

impl Builder {
    /// Begins an index for a guest with this much RAM, in bytes.
    pub fn new(memory_bytes: u64) -> Result<Builder, Error> {
        check_memory_bytes(memory_bytes)?;
        Ok(Builder {
            index: Index {
                memory_bytes,
                extents: Vec::new(),
            },
        })
    }

    /// Adds whole pages, at or after the end of what was added before. An empty run is no change.
    pub fn push(&mut self, offset: u64, len: u64, kind: Kind) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        if !fits(offset, len, self.index.memory_bytes) {
            let kind = kind.number();
            return Err(Error::Extent { offset, len, kind });
        }
        match self.index.extents.last_mut() {
            Some(last) if offset < last.end() => Err(Error::Order {
                offset,
                previous_end: last.end(),
            }),
            Some(last) if offset == last.end() && kind == last.kind => {
                last.len += len;
                Ok(())
            }
            _ => {
                self.index.extents.push(Extent { offset, len, kind });
                Ok(())
            }
        }
    }

    /// The finished index.
    pub fn finish(self) -> Index {
        self.index
    }
}

#[cfg(test)]
mod tests;
