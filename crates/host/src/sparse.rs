//! Sparse files: memory images whose holes are zero pages. Finding the data in them, copying them
//! without filling the holes, making holes of zero pages, and laying a memory layer over a base.
//!
//! Functions take open files and say in their errors at which offset they failed; the caller, who
//! opened the file, adds its path. Walking moves the file's seek position, which nothing else here uses.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use forkd_wire::layer::{Extent, Index, Kind};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// Holes are made and kept in units of this many bytes.
pub const PAGE_SIZE: u64 = forkd_wire::layer::PAGE_SIZE;

/// Bytes moved at a time; a multiple of the page size, small enough to stay in cache.
const CHUNK: usize = 256 * 1024;

static ZERO_PAGE: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// What failed, and where in the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file's size or allocation could not be asked.
    #[error("cannot read the file's size")]
    Stat {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file's size could not be set.
    #[error("cannot set the file's size to {size} bytes")]
    Resize {
        /// The size wanted.
        size: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Looking for data or a hole failed.
    #[error("cannot look for data at offset {offset}")]
    Walk {
        /// Where.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Reading failed, or the file ended early.
    #[error("cannot read {len} bytes at offset {offset}")]
    Read {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Writing failed; a full disk shows up here.
    #[error("cannot write {len} bytes at offset {offset}")]
    Write {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Making a hole failed.
    #[error("cannot free {len} bytes at offset {offset}")]
    Punch {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A layer or its base has not the size of the memory that the index describes.
    #[error("{what} has {found} bytes, its layer index describes {expected} bytes of memory")]
    LayerSize {
        /// `base` or `layer`.
        what: &'static str,
        /// Bytes of memory in the index.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
}

impl Error {
    /// The operating system's error beneath, if there is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Error::Stat { source }
            | Error::Resize { source, .. }
            | Error::Walk { source, .. }
            | Error::Read { source, .. }
            | Error::Write { source, .. }
            | Error::Punch { source, .. } => Some(source),
            Error::LayerSize { .. } => None,
        }
    }
}

/// How a copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// The file system shares the blocks until one side writes.
    Shared,
    /// This many bytes were written; the rest are holes.
    Written(u64),
}

/// The byte ranges of a file that hold data, ascending. Made by [`data_ranges`].
#[derive(Debug)]
pub struct DataRanges<'a> {
    file: &'a File,
    at: u64,
    size: u64,
}

/// Walks the data of a file. A file system that knows no holes reports one range.
pub fn data_ranges(file: &File) -> Result<DataRanges<'_>, Error> {
    let size = size(file)?;
    Ok(DataRanges { file, at: 0, size })
}

impl DataRanges<'_> {
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, Error> {
        match rustix::fs::seek(self.file, to) {
            Ok(offset) => Ok(Some(offset)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(Error::Walk {
                offset: self.at,
                source: errno.into(),
            }),
        }
    }

    fn find(&mut self) -> Result<Option<Range<u64>>, Error> {
        if self.at >= self.size {
            return Ok(None);
        }
        let Some(start) = self.seek(SeekFrom::Data(self.at))? else {
            return Ok(None);
        };
        let end = self.seek(SeekFrom::Hole(start))?.unwrap_or(self.size);
        // Whole pages, so that what a page is does not depend on the file system's block size.
        let start = (start - start % PAGE_SIZE).max(self.at);
        let end = end.checked_next_multiple_of(PAGE_SIZE).unwrap_or(end);
        let end = end.min(self.size);
        Ok((start < end).then_some(start..end))
    }
}

impl Iterator for DataRanges<'_> {
    type Item = Result<Range<u64>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.find();
        // An error or the end stops the walk for good.
        self.at = match &found {
            Ok(Some(range)) => range.end,
            _ => self.size,
        };
        found.transpose()
    }
}

/// Bytes of disk (or memory, for a memory file) that the file occupies.
pub fn allocated_bytes(file: &File) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(|source| Error::Stat { source })?;
    // Always in units of 512 bytes, whatever the file system's block size.
    Ok(metadata.blocks() * 512)
}

/// Makes `to` a copy of `from`. Shares blocks where the file system can; else copies the data ranges
/// and leaves holes where pages are zero. What `to` held is gone.
pub fn copy(from: &File, to: &File) -> Result<Copied, Error> {
    // Not every file system says "unsupported" with the same code; the copy below finds real trouble.
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(Copied::Shared);
    }
    copy_data(from, to).map(Copied::Written)
}

fn copy_data(from: &File, to: &File) -> Result<u64, Error> {
    resize(to, 0)?;
    resize(to, size(from)?)?;
    let mut written = 0;
    read_nonzero(from, |offset, bytes| {
        written += bytes.len() as u64;
        write_at(to, offset, bytes)
    })?;
    Ok(written)
}

/// Reads every page that is not all zero, ascending, in pieces of one page or more. Holes cost nothing.
pub fn read_nonzero(
    file: &File,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut buffer = vec![0; CHUNK];
    for range in data_ranges(file)? {
        for_chunks(file, range?, &mut buffer, |offset, chunk| {
            for run in runs(chunk, |page| !is_zero(page)) {
                each(offset + run.start as u64, &chunk[run])?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Turns pages that hold only zeros into holes; answers how many bytes. Where the file system has no
/// holes, does nothing.
pub fn punch_zero_pages(file: &File) -> Result<u64, Error> {
    let mut freed = 0;
    let mut buffer = vec![0; CHUNK];
    // Collected first: punching changes what the walk would see.
    let ranges = data_ranges(file)?.collect::<Result<Vec<_>, _>>()?;
    for range in ranges {
        for_chunks(file, range, &mut buffer, |offset, chunk| {
            for run in runs(chunk, is_whole_zero_page) {
                if punch(file, offset + run.start as u64, run.len() as u64)? {
                    freed += run.len() as u64;
                }
            }
            Ok(())
        })?;
    }
    Ok(freed)
}

/// Makes a range read as zero, without storage where the file system has holes.
pub fn clear(file: &File, range: Range<u64>) -> Result<(), Error> {
    if punch(file, range.start, range.end - range.start)? {
        return Ok(());
    }
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(PAGE_SIZE);
        write_at(file, at, &ZERO_PAGE[..len as usize])?;
        at += len;
    }
    Ok(())
}

/// Lays a layer over its base: data pages are copied, pages that became zero are cleared, the rest
/// stays. Both files have the size of the memory the index describes.
pub fn apply_layer(base: &File, layer: &File, index: &Index) -> Result<(), Error> {
    for (what, file) in [("base", base), ("layer", layer)] {
        let (expected, found) = (index.memory_bytes(), size(file)?);
        if found != expected {
            return Err(Error::LayerSize {
                what,
                expected,
                found,
            });
        }
    }
    let mut buffer = vec![0; CHUNK];
    for extent in index.extents() {
        apply_extent(base, layer, extent, &mut buffer)?;
    }
    Ok(())
}

fn apply_extent(
    base: &File,
    layer: &File,
    extent: &Extent,
    buffer: &mut [u8],
) -> Result<(), Error> {
    match extent.kind {
        Kind::Zero => clear(base, extent.range()),
        Kind::Data => for_chunks(layer, extent.range(), buffer, |offset, chunk| {
            write_at(base, offset, chunk)
        }),
    }
}

/// The size of a file in bytes.
pub fn size(file: &File) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(|source| Error::Stat { source })?;
    Ok(metadata.len())
}

/// Sets the size of a file; what is added is a hole.
pub fn resize(file: &File, size: u64) -> Result<(), Error> {
    file.set_len(size)
        .map_err(|source| Error::Resize { size, source })
}

/// Whether the bytes are all zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut pages = bytes.chunks(ZERO_PAGE.len());
    pages.all(|page| page == &ZERO_PAGE[..page.len()])
}

/// A short last page stays: its file could not be made shorter by freeing it.
fn is_whole_zero_page(page: &[u8]) -> bool {
    page.len() == ZERO_PAGE.len() && is_zero(page)
}

/// Reads a range piece by piece. Pieces end at page boundaries wherever the range does.
fn for_chunks(
    file: &File,
    range: Range<u64>,
    buffer: &mut [u8],
    mut each: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(buffer.len() as u64);
        let chunk = &mut buffer[..len as usize];
        let read = file.read_exact_at(chunk, at);
        read.map_err(|source| Error::Read {
            offset: at,
            len,
            source,
        })?;
        each(at, chunk)?;
        at += len;
    }
    Ok(())
}

/// The maximal runs of pages in a chunk for which the test holds, in bytes from its start.
fn runs(chunk: &[u8], mut test: impl FnMut(&[u8]) -> bool) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for page in chunk.chunks(ZERO_PAGE.len()) {
        let end = at + page.len();
        if test(page) {
            match found.last_mut() {
                Some(run) if run.end == at => run.end = end,
                _ => found.push(at..end),
            }
        }
        at = end;
    }
    found
}

fn write_at(file: &File, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    let len = bytes.len() as u64;
    let written = file.write_all_at(bytes, offset);
    written.map_err(|source| Error::Write {
        offset,
        len,
        source,
    })
}

/// Makes a hole; `false` where the file system cannot.
fn punch(file: &File, offset: u64, len: u64) -> Result<bool, Error> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, len) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
        Err(errno) => Err(Error::Punch {
            offset,
            len,
            source: errno.into(),
        }),
    }
}

#[cfg(test)]
mod tests;
