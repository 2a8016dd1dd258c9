//! Guest RAM: one private mapping of this process, so that forking the process forks the RAM.
//!
//! ```text
//!   guest-physical            this process                     files
//!   0 ─────────────┐   base ┌──────────────────────┐   ┌─ anonymous (a booted machine)
//!       low RAM    │        │  one contiguous      │◄──┤  memory.bin of each layer, MAP_PRIVATE
//!   3 GiB ─────────┤        │  private mapping     │   └─ a memory file, for what is scattered
//!      devices     │        │                      │
//!   4 GiB ─────────┤        │                      │
//!       high RAM   │        │                      │
//!   ───────────────┘        └──────────────────────┘
//! ```
//!
//! An offset in a memory file is an offset in the mapping; the hole for devices takes no space there.
//! Mapped file pages that nobody wrote cost a fork nothing; pages written in the template itself cost
//! a page-table entry each. So layers are *mapped*, not copied in; where they lie in too many pieces, the
//! short ones are copied together into a memory file, which is mapped.

#![allow(
    unsafe_code,
    reason = "owns the raw mapping of guest RAM; every block is argued"
)]

mod flat;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::layers::{Segment, Source};
use flat::{From, Piece};

/// Guest RAM as devices and loaders see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// RAM below this address; more continues at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 3 << 30;
/// Where RAM beyond [`LOW_RAM_END`] begins.
pub const HIGH_RAM: u64 = 4 << 30;
/// Bytes in a page.
pub const PAGE: u64 = 4096;
/// Smallest and largest guest, MiB.
pub const MIB_RANGE: std::ops::RangeInclusive<u32> = 1..=256 * 1024;

/// Most pieces that memory is mapped in, give or take one; each costs a fork a few hundred nanoseconds.
pub const MAPPED_PIECES_MAX: usize = 192;

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a size a guest can have.
    #[error("a guest cannot have {0} MiB of memory: choose 1 to 262144")]
    Size(u32),
    /// The address space or the memory is not there.
    #[error(
        "cannot map {bytes} bytes of guest memory: choose a smaller guest, or raise the limits on address space and mappings (ulimit -v, vm.max_map_count)"
    )]
    Map {
        /// Bytes wanted.
        bytes: u64,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A layer's memory file is shorter than its index says.
    #[error(
        "memory file of layer {layer} has {found} bytes, its index needs {needed}: the snapshot is damaged, remove it and take or import it again"
    )]
    Short {
        /// Which layer, the lowest is 0.
        layer: usize,
        /// Bytes it has.
        found: u64,
        /// Bytes it needs.
        needed: u64,
    },
    /// A layer's memory file could not be read.
    #[error("cannot read the memory file of layer {layer}")]
    Read {
        /// Which layer, the lowest is 0.
        layer: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Scattered layers could not be copied together.
    #[error("cannot hold what is scattered of the layers in memory")]
    Flatten(#[source] io::Error),
}

/// The mapping, and the guest's view of it. Lives as long as the process: a fork inherits it.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    bytes: u64,
    guest: GuestMemory,
    /// Offsets and lengths that files back: all else was zero when the mapping was made.
    backed: Vec<(u64, u64)>,
}

// SAFETY: `base` is an address in a mapping that is never unmapped or moved while `Memory` lives;
// access goes through `guest`, whose own methods are safe to call from any thread.
unsafe impl Send for Memory {}
// SAFETY: as above; `Memory` itself offers no mutation.
unsafe impl Sync for Memory {}

impl Memory {
    /// Fresh, zero memory.
    pub fn anonymous(mib: u32) -> Result<Memory, Error> {
        if !MIB_RANGE.contains(&mib) {
            return Err(Error::Size(mib));
        }
        Memory::reserve(u64::from(mib) << 20)
    }

    /// Memory composed of layers: `segments` ascending, `files` the layers' memory files.
    pub fn layered(bytes: u64, segments: &[Segment], files: &[File]) -> Result<Memory, Error> {
        check_lengths(segments, files)?;
        let mut memory = Memory::reserve(bytes)?;
        let pieces = flat::plan(segments, MAPPED_PIECES_MAX);
        let copies = pieces.iter().any(|piece| piece.from == From::Copy);
        let copy = copies.then(|| flat::copy(bytes, &pieces, segments, files));
        let copy = copy.transpose()?;
        for Piece { offset, len, from } in pieces {
            match (from, &copy) {
                (From::Source(Source::Layer(layer)), _) => {
                    memory.map_file(offset, len, files[layer].as_fd())?;
                }
                (From::Copy, Some(copy)) => memory.map_file(offset, len, copy.as_fd())?,
                _ => {}
            }
        }
        let backed = segments.iter().filter(|s| s.source != Source::Zero);
        memory.backed = backed.map(|s| (s.offset, s.len)).collect();
        Ok(memory)
    }

    fn reserve(bytes: u64) -> Result<Memory, Error> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let failed = |source| Error::Map { bytes, source };
        let len = usize::try_from(bytes).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) };
        let base = base.map_err(|e| failed(e.into()))?;
        // SAFETY: mmap returned a mapping of `len` bytes at `base`, never at address 0.
        let base = unsafe { NonNull::new_unchecked(base.cast::<u8>()) };
        let guest = guest_view(base, bytes).map_err(failed)?;
        Ok(Memory {
            base,
            bytes,
            guest,
            backed: Vec::new(),
        })
    }

    fn map_file(
        &self,
        offset: u64,
        len: u64,
        file: std::os::fd::BorrowedFd<'_>,
    ) -> Result<(), Error> {
        assert!(
            offset + len <= self.bytes,
            "segments were checked against the size of memory"
        );
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: `offset` lies inside the mapping (asserted above).
        let at = unsafe { self.base.add(offset as usize) };
        // SAFETY: MAP_FIXED replaces only pages of our own mapping, checked to hold `len` bytes from
        // `at`; nobody has read or written them yet, because the machine is not built before this.
        let mapped = unsafe {
            rustix::mm::mmap(at.as_ptr().cast(), len as usize, prot, flags, file, offset)
        };
        mapped.map(drop).map_err(|e| Error::Map {
            bytes: len,
            source: e.into(),
        })
    }

    /// Bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Mebibytes of RAM.
    pub fn mib(&self) -> u32 {
        (self.bytes >> 20) as u32
    }

    /// RAM as devices and loaders see it.
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// Where the mapping begins in this process and in every fork of it.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The pieces of RAM: guest-physical address, offset in the mapping, bytes.
    pub fn regions(&self) -> Vec<(u64, u64, u64)> {
        regions(self.bytes)
    }

    /// The bytes at `[offset, offset + len)`. The guest must stand still: nobody writes while the
    /// slice lives.
    pub fn frozen(&self, offset: u64, len: u64) -> &[u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes));
        // SAFETY: the range lies inside the mapping (asserted); all bytes are initialised (file
        // contents or zero). Callers are the snapshot writers, which run in a process without vCPUs
        // or with all of them parked and devices quiet, so nothing writes meanwhile.
        unsafe { std::slice::from_raw_parts(self.base.add(offset as usize).as_ptr(), len as usize) }
    }

    /// The parts that files back, as offsets and lengths.
    pub fn backed(&self) -> &[(u64, u64)] {
        &self.backed
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this size, and nothing borrows from it any more: VMs that
        // used it hold an `Arc<Memory>`.
        _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes as usize) };
    }
}

fn regions(bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = bytes.min(LOW_RAM_END);
    let mut regions = vec![(0, 0, low)];
    if bytes > low {
        regions.push((HIGH_RAM, low, bytes - low));
    }
    regions
}

fn guest_view(base: NonNull<u8>, bytes: u64) -> io::Result<GuestMemory> {
    let mut views = Vec::new();
    for (address, offset, len) in regions(bytes) {
        let prot = (ProtFlags::READ | ProtFlags::WRITE).bits() as i32;
        let flags = (MapFlags::PRIVATE | MapFlags::NORESERVE).bits() as i32;
        // SAFETY: `offset` and `len` come from `regions`, which divides the mapping.
        let builder = unsafe {
            MmapRegionBuilder::new(len as usize)
                .with_raw_mmap_pointer(base.add(offset as usize).as_ptr())
        };
        let region = builder.with_mmap_prot(prot).with_mmap_flags(flags).build();
        let region = region.map_err(io::Error::other)?;
        let view = GuestRegionMmap::new(region, GuestAddress(address));
        views.push(view.ok_or_else(|| io::Error::other("guest address overflow"))?);
    }
    GuestMemory::from_regions(views).map_err(io::Error::other)
}

/// A mapping beyond the end of a file would kill a sandbox at its first touch (SIGBUS).
fn check_lengths(segments: &[Segment], files: &[File]) -> Result<(), Error> {
    for (layer, file) in files.iter().enumerate() {
        let of_layer = segments.iter().filter(|s| s.source == Source::Layer(layer));
        let needed = of_layer.map(|s| s.offset + s.len).max().unwrap_or(0);
        let found = file
            .metadata()
            .map_err(|source| Error::Read { layer, source })?
            .len();
        if found < needed {
            return Err(Error::Short {
                layer,
                found,
                needed,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
