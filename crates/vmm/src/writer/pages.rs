//! Which pages to write: the process's own, and which of those are zero.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use forkd_wire::layer::{Kind, PAGE_SIZE};

use crate::memory::Memory;
use crate::sys::{self, PageRegion};

const PAGE: usize = PAGE_SIZE as usize;

/// Ranges of memory, as offsets and lengths, ascending and apart, that are not simply the file's
/// pages or untouched. `pagemap` is of this process or of the one it was forked from; without it the
/// process opens its own.
pub(super) fn own(memory: &Memory, pagemap: Option<&File>) -> io::Result<Vec<(u64, u64)>> {
    let opened;
    let pagemap = match pagemap {
        Some(pagemap) => pagemap,
        None => {
            opened = File::open("/proc/self/pagemap")?;
            &opened
        }
    };
    match scan(memory, pagemap) {
        // Linux before 6.7 has no scan: read the map entry by entry.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read_entries(memory, pagemap)
        }
        ranges => ranges,
    }
}

pub(super) fn scan(memory: &Memory, pagemap: &File) -> io::Result<Vec<(u64, u64)>> {
    let base = memory.address();
    let end = base + memory.bytes();
    let mut regions = vec![PageRegion::default(); 1024];
    let mut ranges = Vec::new();
    let mut at = base;
    while at < end {
        let (found, stopped) = sys::own_pages(pagemap.as_fd(), at, end, &mut regions)?;
        for region in &regions[..found] {
            push(&mut ranges, region.start - base, region.end - region.start);
        }
        // Where the kernel stopped when its own, smaller buffer was full last, which it forgets to correct when
        // it then comes to the end (seen with Linux 6.18): what was found already is not looked at again.
        let next = regions[..found].last().map_or(stopped, |last| last.end);
        let stopped = stopped.max(next);
        if stopped <= at {
            return Err(io::Error::other(
                "the scan of the page map does not advance",
            ));
        }
        at = stopped;
    }
    Ok(ranges)
}

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

pub(super) fn read_entries(memory: &Memory, pagemap: &File) -> io::Result<Vec<(u64, u64)>> {
    let first = memory.address() / PAGE_SIZE;
    let pages = memory.bytes() / PAGE_SIZE;
    let mut ranges = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let mut page = 0;
    while page < pages {
        let want = ((pages - page) * 8).min(buffer.len() as u64) as usize;
        pagemap.read_exact_at(&mut buffer[..want], (first + page) * 8)?;
        for entry in buffer[..want].chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().expect("chunks of 8"));
            if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                push(&mut ranges, page * PAGE_SIZE, PAGE_SIZE);
            }
            page += 1;
        }
    }
    Ok(ranges)
}

fn push(ranges: &mut Vec<(u64, u64)>, offset: u64, len: u64) {
    match ranges.last_mut() {
        Some((start, run)) if *start + *run == offset => *run += len,
        _ => ranges.push((offset, len)),
    }
}

/// All that is in `ranges` or in `more`; both ascending, the result ascending and apart.
pub(super) fn union(ranges: Vec<(u64, u64)>, more: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = ranges.into_iter().chain(more.iter().copied()).collect();
    all.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(all.len());
    for (offset, len) in all {
        match joined.last_mut() {
            Some((start, run)) if *start + *run >= offset => {
                *run = (*run).max(offset + len - *start);
            }
            _ => joined.push((offset, len)),
        }
    }
    joined
}

/// Runs of pages in `bytes` of one kind: start, length, kind.
pub(super) fn runs(bytes: &[u8]) -> Vec<(usize, usize, Kind)> {
    let mut runs: Vec<(usize, usize, Kind)> = Vec::new();
    for (number, page) in bytes.chunks(PAGE).enumerate() {
        let kind = if is_zero(page) {
            Kind::Zero
        } else {
            Kind::Data
        };
        match runs.last_mut() {
            Some((_, len, last)) if *last == kind => *len += page.len(),
            _ => runs.push((number * PAGE, page.len(), kind)),
        }
    }
    runs
}

fn is_zero(page: &[u8]) -> bool {
    // Most pages differ early; the rest is compared in one pass that the compiler vectorises.
    page.starts_with(&[0; 16]) && page[..page.len() - 16] == page[16..]
}
