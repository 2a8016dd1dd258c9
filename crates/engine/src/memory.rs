//! A guest's RAM, seen from outside its process: as files, and as pages that differ from them.
//!
//! A forked VM maps its base privately. What it wrote since are anonymous pages, which the kernel tells
//! apart in `/proc/<pid>/pagemap`; they are read through `/proc/<pid>/mem`. Both are only true while the
//! vCPUs stand still. Everything here blocks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_host::sparse;
use forkd_wire::layer::{self, Kind};
use rustix::fs::{Advice, MemfdFlags, SealFlags};

use crate::rundir::failed;
use crate::{Error, LayerFiles, SnapshotFiles};
use forkd_host::chain;

const PAGE: u64 = layer::PAGE_SIZE;
/// Pagemap entries read at once: 16 MiB of guest RAM.
const ENTRIES: usize = 4096;
/// Bytes copied at once.
const CHUNK: usize = 256 * 1024;

/// Of a pagemap entry: in memory; on swap; of a file or shared.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// Where a VM's RAM is.
#[derive(Debug, Clone)]
pub(crate) enum Ram {
    /// In this file.
    Shared(Arc<File>, PathBuf),
    /// In this file, except for the pages that the VM wrote.
    Private(Arc<File>, PathBuf),
}

impl Ram {
    /// Opens the file.
    pub(crate) fn open(path: &Path, shared: bool) -> io::Result<Ram> {
        Ok(Ram::new(File::open(path)?, path, shared))
    }

    pub(crate) fn new(file: File, path: &Path, shared: bool) -> Ram {
        let (file, path) = (Arc::new(file), path.to_owned());
        match shared {
            true => Ram::Shared(file, path),
            false => Ram::Private(file, path),
        }
    }
}

/// A part of guest RAM in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// In guest RAM, bytes.
    pub(crate) guest: Range<u64>,
    /// Where it begins in the process.
    pub(crate) address: u64,
}

/// The RAM of a forked VM.
#[derive(Debug)]
pub(crate) struct PrivateRam {
    pid: u32,
    mem: File,
    pagemap: File,
    parts: Vec<Part>,
    size: u64,
}

impl PrivateRam {
    /// Finds the RAM of a process that maps `base` privately.
    pub(crate) fn find(pid: u32, base: &File) -> Result<PrivateRam, Error> {
        let open = |name: &str| {
            let path = PathBuf::from(format!("/proc/{pid}/{name}"));
            File::open(&path).map_err(failed("open", &path))
        };
        let path = PathBuf::from(format!("/proc/{pid}/maps"));
        let maps = std::fs::read_to_string(&path).map_err(failed("read", &path))?;
        let base = base.metadata().map_err(failed("read", &path))?;
        let parts = parse_maps(&maps, base.ino());
        let size = parts
            .iter()
            .map(|part| part.guest.end - part.guest.start)
            .sum();
        if base.len() != size {
            return Err(Error::Control {
                step: "find guest memory",
                detail: format!("process {pid} maps {size} bytes of it, not {}", base.len()),
            });
        }
        Ok(PrivateRam {
            pid,
            mem: open("mem")?,
            pagemap: open("pagemap")?,
            parts,
            size,
        })
    }

    /// Calls `each` with every page that is the process's own, ascending, in runs of one kind.
    fn for_private(
        &self,
        mut each: impl FnMut(u64, &[u8], Kind) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut buffer = vec![0; CHUNK];
        for part in &self.parts {
            for run in self.private_runs(part)? {
                let mut at = run.start;
                while at < run.end {
                    let len = (run.end - at).min(CHUNK as u64);
                    let chunk = &mut buffer[..len as usize];
                    let address = part.address + (at - part.guest.start);
                    let read = self.mem.read_exact_at(chunk, address);
                    read.map_err(failed("read", &self.proc("mem")))?;
                    by_kind(at, chunk, &mut each)?;
                    at += len;
                }
            }
        }
        Ok(())
    }

    /// The runs of private pages of a part, in guest RAM.
    fn private_runs(&self, part: &Part) -> Result<Vec<Range<u64>>, Error> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut entries = vec![0; ENTRIES * 8];
        let mut at = part.guest.start;
        while at < part.guest.end {
            let pages = ((part.guest.end - at) / PAGE).min(ENTRIES as u64);
            let bytes = &mut entries[..pages as usize * 8];
            let address = part.address + (at - part.guest.start);
            let read = self.pagemap.read_exact_at(bytes, address / PAGE * 8);
            read.map_err(failed("read", &self.proc("pagemap")))?;
            for entry in bytes.as_chunks::<8>().0 {
                if is_private(u64::from_ne_bytes(*entry)) {
                    match runs.last_mut() {
                        Some(run) if run.end == at => run.end += PAGE,
                        _ => runs.push(at..at + PAGE),
                    }
                }
                at += PAGE;
            }
        }
        Ok(runs)
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.pid).into()
    }

    /// Writes the private pages as a layer. Answers the bytes of data.
    pub(crate) fn save_layer(&self, files: &LayerFiles) -> Result<u64, Error> {
        let memory = create(&files.memory, self.size)?;
        let refused = |error: layer::Error| Error::Control {
            step: "save memory",
            detail: error.to_string(),
        };
        let mut index = layer::Builder::new(self.size).map_err(refused)?;
        self.for_private(|offset, bytes, kind| {
            if kind == Kind::Data {
                let written = memory.write_all_at(bytes, offset);
                written.map_err(failed("write", &files.memory))?;
            }
            index
                .push(offset, bytes.len() as u64, kind)
                .map_err(refused)
        })?;
        let index = index.finish();
        let bytes = index.encode();
        write_new(&files.index, &bytes).map_err(failed("write", &files.index))?;
        Ok(index.data_bytes())
    }

    /// Writes the private pages over a copy of the base. Answers the bytes of data.
    pub(crate) fn save_over(&self, copy: &File, path: &Path) -> Result<u64, Error> {
        let mut written = 0;
        self.for_private(|offset, bytes, kind| match kind {
            Kind::Zero => sparse::clear(copy, offset..offset + bytes.len() as u64)
                .map_err(sparse_failed("write", path)),
            Kind::Data => {
                written += bytes.len() as u64;
                let done = copy.write_all_at(bytes, offset);
                done.map_err(failed("write", path))
            }
        })?;
        Ok(written)
    }
}

fn is_private(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0
}

/// Splits a chunk into runs of pages that are zero and runs that are not.
fn by_kind(
    offset: u64,
    chunk: &[u8],
    each: &mut impl FnMut(u64, &[u8], Kind) -> Result<(), Error>,
) -> Result<(), Error> {
    let kind_of = |page: &[u8]| match sparse::is_zero(page) {
        true => Kind::Zero,
        false => Kind::Data,
    };
    let mut start = 0;
    while start < chunk.len() {
        let mut pages = chunk[start..].chunks(PAGE as usize);
        let kind = pages.next().map_or(Kind::Zero, kind_of);
        let same = 1 + pages.take_while(|page| kind_of(page) == kind).count();
        let end = (start + same * PAGE as usize).min(chunk.len());
        each(offset + start as u64, &chunk[start..end], kind)?;
        start = end;
    }
    Ok(())
}

/// The private writable mappings of the file with this inode number, by offset in the file. Its device
/// is not compared: some file systems show another one there.
pub(crate) fn parse_maps(maps: &str, inode: u64) -> Vec<Part> {
    let parse = |line: &str| -> Option<Part> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let flags = fields.next()?;
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let found: u64 = fields.nth(1)?.parse().ok()?;
        let address = u64::from_str_radix(start, 16).ok()?;
        let len = u64::from_str_radix(end, 16).ok()?.checked_sub(address)?;
        let guest = offset..offset.checked_add(len)?;
        let wanted = found == inode && flags.starts_with("rw") && flags.ends_with('p');
        wanted.then_some(Part { guest, address })
    };
    let mut parts: Vec<Part> = maps.lines().filter_map(parse).collect();
    parts.sort_by_key(|part| part.guest.start);
    parts
}

/// The RAM of a VM whose memory file has lost its name: the kernel still knows it by its mapping.
pub(crate) fn mapped_ram(pid: u32, path: &Path, shared: bool) -> io::Result<Ram> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let name = path.to_string_lossy();
    let line = maps.lines().find(|line| line.contains(&*name));
    let range = line.and_then(|line| line.split_ascii_whitespace().next());
    let range = range.ok_or(io::ErrorKind::NotFound)?;
    let file = File::open(format!("/proc/{pid}/map_files/{range}"))?;
    Ok(Ram::new(file, path, shared))
}

/// Copies a memory file, leaving out zero pages. Answers the bytes written.
pub(crate) fn copy_new(from: &File, from_path: &Path, to: &Path) -> Result<(File, u64), Error> {
    let copy = create(to, 0)?;
    let copied = sparse::copy(from, &copy).map_err(sparse_failed("copy", from_path))?;
    let bytes = match copied {
        sparse::Copied::Written(bytes) => bytes,
        sparse::Copied::Shared => {
            sparse::punch_zero_pages(&copy).map_err(sparse_failed("write", to))?;
            sparse::allocated_bytes(&copy).map_err(sparse_failed("read", to))?
        }
    };
    Ok((copy, bytes))
}

/// Lays a snapshot's layers over its base, into a new file. Answers that, open for reading.
pub(crate) fn flatten(files: &SnapshotFiles, size: u64, to: &Path) -> Result<File, Error> {
    let base = open_memory(&files.memory, size)?;
    let (flat, _) = copy_new(&base, &files.memory, to)?;
    apply(files, size, &flat)?;
    File::open(to).map_err(failed("open", to))
}

/// A snapshot's memory, layers and all, in a file of no directory that nobody can write any more. It takes RAM
/// as long as it is open or mapped.
pub(crate) fn seal(files: &SnapshotFiles, size: u64, name: &str) -> Result<File, Error> {
    let base = open_memory(&files.memory, size)?;
    let at = |step| move |errno: rustix::io::Errno| failed(step, &sealed_path(name))(errno.into());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let sealed = rustix::fs::memfd_create(sealed_name(name), flags).map_err(at("make"))?;
    let sealed = File::from(sealed);
    sparse::copy(&base, &sealed).map_err(sparse_failed("copy", &files.memory))?;
    apply(files, size, &sealed)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&sealed, seals).map_err(at("seal"))?;
    // It is in memory once, which is enough. Pages that are not on the disk yet stay.
    let _ = rustix::fs::fadvise(&base, 0, None, Advice::DontNeed);
    Ok(sealed)
}

/// The kernel's name for the file that [`seal`] makes, in `/proc/<pid>/maps`.
pub(crate) fn sealed_path(name: &str) -> PathBuf {
    format!("/memfd:{}", sealed_name(name)).into()
}

fn sealed_name(name: &str) -> String {
    format!("forkd-{name}")
}

fn apply(files: &SnapshotFiles, size: u64, flat: &File) -> Result<(), Error> {
    for layer in &files.layers {
        let memory = open_memory(&layer.memory, size)?;
        let index = read_index(&layer.index, size)?;
        let applied = sparse::apply_layer(flat, &memory, &index);
        applied.map_err(sparse_failed("apply", &layer.memory))?;
    }
    Ok(())
}

fn read_index(path: &Path, size: u64) -> Result<layer::Index, Error> {
    let max = layer::Index::encoded_len_max(size);
    let bytes = forkd_host::file::read_bounded(path, max);
    let bytes = bytes.map_err(|error| unusable(path, chain(&error)))?;
    layer::Index::decode(&bytes).map_err(|error| unusable(path, error.to_string()))
}

/// Opens a memory file, which must have the size of the machine's RAM.
pub(crate) fn open_memory(path: &Path, size: u64) -> Result<File, Error> {
    let file = File::open(path).map_err(failed("open", path))?;
    let found = file.metadata().map_err(failed("open", path))?.len();
    if found != size {
        let problem = format!("it has {found} bytes, the machine's memory {size}");
        return Err(unusable(path, problem));
    }
    Ok(file)
}

fn unusable(path: &Path, problem: String) -> Error {
    Error::Snapshot {
        path: path.to_owned(),
        problem: format!("{problem}; make the snapshot anew"),
    }
}

/// Creates a file of this size that holds nothing.
pub(crate) fn create(path: &Path, size: u64) -> Result<File, Error> {
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(path);
    let file = file.map_err(failed("create", path))?;
    file.set_len(size).map_err(failed("create", path))?;
    Ok(file)
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    io::Write::write_all(&mut File::create_new(path)?, bytes)
}

/// Adds step and path to an error about a sparse file.
fn sparse_failed(step: &'static str, path: &Path) -> impl FnOnce(sparse::Error) -> Error {
    let path = path.to_owned();
    move |error| match error {
        sparse::Error::LayerSize { .. } => unusable(&path, error.to_string()),
        _ => Error::File {
            step,
            source: io::Error::new(
                error.io().map_or(io::ErrorKind::Other, io::Error::kind),
                error,
            ),
            path,
        },
    }
}
