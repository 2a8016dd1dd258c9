//! Writing a snapshot's files from memory: the pages that differ from the base, an index that tells
//! zero from unchanged, and the state.
//!
//! Which pages are a process's own is asked of the kernel's copy-on-write bookkeeping, so nothing has
//! to be recorded while the guest runs. The files come as descriptors: this process has no paths.

mod pages;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use forkd_wire::layer::{self, Builder, Kind, PAGE_SIZE};
use forkd_wire::vmm::Reply;

use crate::control::failure;
use crate::controller::Controller;
use crate::machine::Frozen;
use crate::memory::Memory;

/// Bytes written at once.
const CHUNK: u64 = 1 << 20;

/// Why a snapshot could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Descriptors are missing.
    #[error(
        "writing needs three files (memory, index, state) and may take a pagemap, {0} descriptors came"
    )]
    Files(usize),
    /// The kernel does not say which pages differ.
    #[error(
        "cannot read the process's page map: pass /proc/PID/pagemap, opened by root, with the request"
    )]
    Pagemap(#[source] io::Error),
    /// A file could not be written.
    #[error(
        "cannot write the snapshot's {file} file: free space or choose another disk, the branch stays usable in memory"
    )]
    Write {
        /// Which.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The index refused an extent.
    #[error("cannot index the snapshot's pages")]
    Index(#[from] layer::Error),
}

/// Which pages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Those that differ from the base.
    Own,
    /// All of memory; the result stands alone.
    Everything,
}

/// The files to write.
#[derive(Debug)]
pub struct Files {
    memory: File,
    index: File,
    state: File,
    pagemap: Option<File>,
}

impl Files {
    /// Takes the descriptors of a request.
    pub fn take(fds: Vec<OwnedFd>) -> Result<Files, Error> {
        let count = fds.len();
        let mut fds = fds.into_iter().map(File::from);
        match (fds.next(), fds.next(), fds.next(), fds.next(), fds.next()) {
            (Some(memory), Some(index), Some(state), pagemap, None) => Ok(Files {
                memory,
                index,
                state,
                pagemap,
            }),
            _ => Err(Error::Files(count)),
        }
    }
}

/// Writes in a process of its own: answers the request, and tells the template by its exit code, an
/// errno or 0.
pub fn run(
    controller: &Controller,
    seq: u32,
    memory: &Memory,
    frozen: &Frozen,
    files: Files,
    scope: Scope,
) -> i32 {
    match write(memory, frozen, &files, scope) {
        Ok(written) => {
            controller.reply(seq, &written, &[]);
            0
        }
        Err(error) => {
            // What was written is of no use: give the space back before anybody hears of it.
            _ = files.memory.set_len(0);
            controller.fail(seq, &error);
            let errno = failure(&error).errno;
            i32::try_from(errno)
                .ok()
                .filter(|errno| (1..255).contains(errno))
                .unwrap_or(libc::EIO)
        }
    }
}

/// Writes the files and syncs them. Nothing changes guest memory meanwhile.
pub fn write(
    memory: &Memory,
    frozen: &Frozen,
    files: &Files,
    scope: Scope,
) -> Result<Reply, Error> {
    let start = Instant::now();
    let mut ranges = pages::own(memory, files.pagemap.as_ref()).map_err(Error::Pagemap)?;
    if scope == Scope::Everything {
        ranges = pages::union(ranges, memory.backed());
    }
    let failed = |file| move |source| Error::Write { file, source };
    files
        .memory
        .set_len(memory.bytes())
        .map_err(failed("memory"))?;
    let mut builder = Builder::new(memory.bytes())?;
    for (offset, len) in ranges {
        write_range(memory, &files.memory, offset, len, scope, &mut builder)?;
    }
    files.memory.sync_data().map_err(failed("memory"))?;
    let index = builder.finish();
    files
        .index
        .write_all_at(&index.encode(), 0)
        .map_err(failed("index"))?;
    files.index.sync_all().map_err(failed("index"))?;
    let state = frozen.state().encode();
    files
        .state
        .write_all_at(&state, 0)
        .map_err(failed("state"))?;
    files.state.sync_all().map_err(failed("state"))?;
    Ok(Reply::Written {
        data_bytes: index.data_bytes(),
        zero_bytes: index.zero_bytes(),
        extents: index.extents().len() as u32,
        state_hash: *blake3::hash(&state).as_bytes(),
        took_ms: u32::try_from(start.elapsed().as_millis()).unwrap_or(u32::MAX),
    })
}

/// Writes runs of non-zero pages and notes runs of zero ones.
fn write_range(
    memory: &Memory,
    file: &File,
    offset: u64,
    len: u64,
    scope: Scope,
    builder: &mut Builder,
) -> Result<(), Error> {
    let mut at = offset;
    let end = offset + len;
    while at < end {
        let chunk = memory.frozen(at, (end - at).min(CHUNK));
        for (start, run, kind) in pages::runs(chunk) {
            let offset = at + start as u64;
            match kind {
                Kind::Data => {
                    let bytes = &chunk[start..start + run];
                    let failed = |source| Error::Write {
                        file: "memory",
                        source,
                    };
                    file.write_all_at(bytes, offset).map_err(failed)?;
                }
                // What no layer mentions is zero: a snapshot that stands alone need not say so.
                Kind::Zero if scope == Scope::Everything => continue,
                Kind::Zero => {}
            }
            builder.push(offset, run as u64, kind)?;
        }
        at += chunk.len() as u64;
    }
    debug_assert!(at.is_multiple_of(PAGE_SIZE));
    Ok(())
}

#[cfg(test)]
mod tests;
