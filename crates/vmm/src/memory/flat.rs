//! Scattered layers: what is mapped from the layers' files, and what is copied together into one memory
//! file first.
//!
//! ```text
//!   segments   ▒▒▒▒▒▒▒▒▒▒│0│1│0│1│0│1│▒▒▒▒▒▒▒▒▒▒▒▒▒│1│0│1│   of layers 0 and 1, or of neither
//!   pieces     │ mapped  │   copied  │   mapped    │copied│
//! ```
//!
//! Long segments are mapped, at no cost; only the short ones between them are copied. A copied piece costs
//! its forks what a mapped one does.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;

use super::{Error, PAGE};
use crate::layers::{Segment, Source};

/// What a hole in a memory file reads as.
static ZERO_BLOCK: [u8; 64 << 10] = [0; 64 << 10];
/// Bytes copied at once.
const CHUNK: u64 = 1 << 20;

/// A part of RAM that is one mapping, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) from: From,
}

/// What a piece is mapped from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// A layer, or nothing.
    Source(Source),
    /// The file that segments are copied into.
    Copy,
}

/// Divides memory into at most `max` pieces, of which the copied ones are as small as need be: the longest
/// segments stay as they are. With few segments nothing is copied. Pure.
pub(super) fn plan(segments: &[Segment], max: usize) -> Vec<Piece> {
    let longest_copied = longest_copied(segments, max);
    let mut pieces: Vec<Piece> = Vec::new();
    for segment in segments {
        let keep = segment.len > longest_copied;
        match pieces.last_mut() {
            Some(last) if !keep && last.from == From::Copy => last.len += segment.len,
            _ => pieces.push(Piece {
                offset: segment.offset,
                len: segment.len,
                from: if keep {
                    From::Source(segment.source)
                } else {
                    From::Copy
                },
            }),
        }
    }
    pieces
}

/// Length up to which segments are copied; 0 if none need be. Between any two that are kept there may be
/// a copied piece, so half of the pieces are theirs.
fn longest_copied(segments: &[Segment], max: usize) -> u64 {
    if segments.len() <= max {
        return 0;
    }
    let mut lengths: Vec<u64> = segments.iter().map(|segment| segment.len).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    lengths[max / 2]
}

/// Copies the segments that lie in copied pieces into a memory file, at their own offsets.
pub(super) fn copy(
    bytes: u64,
    pieces: &[Piece],
    segments: &[Segment],
    files: &[File],
) -> Result<File, Error> {
    let flat = rustix::fs::memfd_create("forkd-flat", MemfdFlags::CLOEXEC);
    let flat = File::from(flat.map_err(|e| Error::Flatten(e.into()))?);
    flat.set_len(bytes).map_err(Error::Flatten)?;
    let mut buffer = vec![0; CHUNK as usize];
    for piece in pieces.iter().filter(|piece| piece.from == From::Copy) {
        let first = segments.partition_point(|segment| segment.offset < piece.offset);
        let mut rest = &segments[first..];
        let end = piece.offset + piece.len;
        let mut at = piece.offset;
        while at < end {
            let chunk = &mut buffer[..(end - at).min(CHUNK) as usize];
            gather(at, chunk, &mut rest, files)?;
            write_non_zero(&flat, at, chunk)?;
            at += chunk.len() as u64;
        }
    }
    Ok(flat)
}

/// Reads the memory at `[at, at + chunk.len())`, whose segments are the first of `rest`; leaves there the
/// one that goes on behind it.
fn gather(at: u64, chunk: &mut [u8], rest: &mut &[Segment], files: &[File]) -> Result<(), Error> {
    let end = at + chunk.len() as u64;
    while let Some(segment) = rest.first().filter(|segment| segment.offset < end) {
        let (from, to) = (
            segment.offset.max(at),
            (segment.offset + segment.len).min(end),
        );
        let part = &mut chunk[(from - at) as usize..(to - at) as usize];
        match segment.source {
            Source::Zero => part.fill(0),
            Source::Layer(layer) => files[layer]
                .read_exact_at(part, from)
                .map_err(|source| Error::Read { layer, source })?,
        }
        if to < segment.offset + segment.len {
            break;
        }
        *rest = &rest[1..];
    }
    Ok(())
}

/// Writes what is not zero already; written, that would take memory.
fn write_non_zero(flat: &File, at: u64, chunk: &[u8]) -> Result<(), Error> {
    let mut start = None;
    for (block, bytes) in chunk.chunks(PAGE as usize).enumerate() {
        let offset = block * PAGE as usize;
        let zero = bytes == &ZERO_BLOCK[..bytes.len()];
        match (start, zero) {
            (None, false) => start = Some(offset),
            (Some(from), true) => {
                write(flat, at + from as u64, &chunk[from..offset])?;
                start = None;
            }
            _ => {}
        }
    }
    match start {
        Some(from) => write(flat, at + from as u64, &chunk[from..]),
        None => Ok(()),
    }
}

fn write(flat: &File, at: u64, bytes: &[u8]) -> Result<(), Error> {
    flat.write_all_at(bytes, at).map_err(Error::Flatten)
}

#[cfg(test)]
mod tests;
