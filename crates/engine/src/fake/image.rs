//! A fake guest's RAM and device state as files. Everything here blocks.
//!
//! ```text
//!   RAM:    magic "FKDFAKE1"   length, u64 little-endian   blake3 of what follows   the guest's state, JSON
//!   state:  machine, JSON      blake3 of it, 32 bytes
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use forkd_host::file::read_bounded;
use forkd_host::sparse;
use forkd_wire::layer::{Builder, Index, Kind, PAGE_SIZE};

use super::guest::State;
use crate::{Error, LayerFiles, MachineSpec, SnapshotFiles};

const MAGIC: [u8; 8] = *b"FKDFAKE1";
const HASH: usize = blake3::OUT_LEN;
const HEADER: usize = MAGIC.len() + 8 + HASH;
const PAGE: usize = PAGE_SIZE as usize;
/// State files are a few dozen bytes.
const STATE_MAX: u64 = 4096;

/// The used beginning of RAM, in whole pages.
pub(super) fn render(state: &State) -> Vec<u8> {
    let json = serde_json::to_vec(state).expect("maps with text keys can be written as JSON");
    let mut ram = Vec::with_capacity(HEADER + json.len() + PAGE);
    ram.extend_from_slice(&MAGIC);
    ram.extend_from_slice(&(json.len() as u64).to_le_bytes());
    ram.extend_from_slice(blake3::hash(&json).as_bytes());
    ram.extend_from_slice(&json);
    ram.resize(ram.len().next_multiple_of(PAGE), 0);
    ram
}

/// Reads RAM back; `path` is named if it is damaged.
pub(super) fn parse(ram: &[u8], path: &Path) -> Result<State, Error> {
    let damaged = || unusable(path, "it is damaged");
    let (magic, rest) = ram.split_at_checked(MAGIC.len()).ok_or_else(damaged)?;
    let (len, rest) = rest.split_first_chunk::<8>().ok_or_else(damaged)?;
    let (hash, rest) = rest.split_at_checked(HASH).ok_or_else(damaged)?;
    let len = usize::try_from(u64::from_le_bytes(*len)).ok();
    let json = len.and_then(|len| rest.get(..len)).ok_or_else(damaged)?;
    if magic != MAGIC || blake3::hash(json).as_bytes() != hash {
        return Err(damaged());
    }
    serde_json::from_slice(json).map_err(|_| damaged())
}

/// A new file of this size that holds nothing.
pub(super) fn create(path: &Path, size: u64) -> Result<File, Error> {
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(path);
    let file = file.map_err(failed("create", path))?;
    file.set_len(size).map_err(failed("create", path))?;
    Ok(file)
}

/// Writes RAM whole.
pub(super) fn save_full(ram: &[u8], size: u64, path: &Path) -> Result<u64, Error> {
    fits(ram, size, path)?;
    let file = create(path, size)?;
    for (page, bytes) in ram.chunks(PAGE).enumerate() {
        if !sparse::is_zero(bytes) {
            let written = file.write_all_at(bytes, page as u64 * PAGE_SIZE);
            written.map_err(failed("write", path))?;
        }
    }
    Ok(ram.len() as u64)
}

/// Refuses to write over anything.
pub(super) fn refuse_existing(paths: &[&PathBuf]) -> Result<(), Error> {
    match paths.iter().find(|path| path.exists()) {
        Some(path) => Err(failed("save to", path)(io::ErrorKind::AlreadyExists.into())),
        None => Ok(()),
    }
}

/// Half a snapshot is none; most of these were never made.
pub(super) fn remove(paths: &[&PathBuf]) {
    for path in paths {
        let _ = std::fs::remove_file(path);
    }
}

/// Writes what differs from the base.
pub(super) fn save_layer(
    ram: &[u8],
    base: &[u8],
    size: u64,
    files: &LayerFiles,
) -> Result<u64, Error> {
    fits(ram, size, &files.memory)?;
    let refused = |error: forkd_wire::layer::Error| Error::Control {
        step: "save memory",
        detail: error.to_string(),
    };
    let file = create(&files.memory, size)?;
    let mut index = Builder::new(size).map_err(refused)?;
    let zeros = [0; PAGE];
    let page_of = |all: &[u8], at: usize| all.get(at..at + PAGE).unwrap_or(&zeros).to_vec();
    for at in (0..ram.len().max(base.len())).step_by(PAGE) {
        let (new, old) = (page_of(ram, at), page_of(base, at));
        if new == old {
            continue;
        }
        let kind = match sparse::is_zero(&new) {
            true => Kind::Zero,
            false => Kind::Data,
        };
        if kind == Kind::Data {
            let written = file.write_all_at(&new, at as u64);
            written.map_err(failed("write", &files.memory))?;
        }
        index.push(at as u64, PAGE_SIZE, kind).map_err(refused)?;
    }
    let index = index.finish();
    write_new(&files.index, &index.encode())?;
    Ok(index.data_bytes())
}

/// Reads the used beginning of RAM: the base with its layers.
pub(super) fn load(files: &SnapshotFiles, size: u64) -> Result<Vec<u8>, Error> {
    let mut ram = Vec::new();
    let base = open(&files.memory, size)?;
    let read = sparse::read_nonzero(&base, |offset, bytes| {
        put(&mut ram, offset, bytes);
        Ok(())
    });
    read.map_err(|error| unusable(&files.memory, &error.to_string()))?;
    for layer in &files.layers {
        let memory = open(&layer.memory, size)?;
        let bytes = read_bounded(&layer.index, Index::encoded_len_max(size));
        let bytes = bytes.map_err(|error| unusable(&layer.index, &error.to_string()))?;
        let index = Index::decode(&bytes);
        let index = index.map_err(|error| unusable(&layer.index, &error.to_string()))?;
        for extent in index.extents() {
            let mut bytes = vec![0; usize::try_from(extent.len).unwrap_or(0)];
            if extent.kind == Kind::Data {
                let read = memory.read_exact_at(&mut bytes, extent.offset);
                read.map_err(failed("read", &layer.memory))?;
            }
            put(&mut ram, extent.offset, &bytes);
        }
    }
    Ok(ram)
}

fn put(ram: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let end = at.saturating_add(bytes.len());
    if ram.len() < end {
        ram.resize(end, 0);
    }
    ram[at..end].copy_from_slice(bytes);
}

fn open(path: &Path, size: u64) -> Result<File, Error> {
    let file = File::open(path).map_err(failed("open", path))?;
    let found = file.metadata().map_err(failed("open", path))?.len();
    if found != size {
        let problem = format!("it has {found} bytes, the machine's memory {size}");
        return Err(unusable(path, &problem));
    }
    Ok(file)
}

fn fits(ram: &[u8], size: u64, path: &Path) -> Result<(), Error> {
    match ram.len() as u64 <= size {
        true => Ok(()),
        false => Err(unusable(
            path,
            "the guest's state is larger than its memory",
        )),
    }
}

fn machine_json(machine: &MachineSpec) -> Vec<u8> {
    let (vcpus, memory_mib, network) = (machine.vcpus, machine.memory_mib, machine.network);
    format!(r#"{{"vcpus":{vcpus},"memory_mib":{memory_mib},"network":{network}}}"#).into_bytes()
}

/// Writes a state file.
pub(super) fn write_state(path: &Path, machine: &MachineSpec) -> Result<(), Error> {
    let mut bytes = machine_json(machine);
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    write_new(path, &bytes)
}

/// Checks that a state file is whole and of this machine.
pub(super) fn check_state(path: &Path, machine: &MachineSpec) -> Result<(), Error> {
    let file = File::open(path).map_err(failed("open", path))?;
    drop(file);
    let bytes = read_bounded(path, STATE_MAX);
    let bytes = bytes.map_err(|error| unusable(path, &error.to_string()))?;
    let split = bytes.len().checked_sub(HASH);
    let (json, hash) = bytes.split_at(split.unwrap_or(0));
    if split.is_none() || blake3::hash(json).as_bytes() != hash {
        return Err(unusable(path, "it is damaged or cut short"));
    }
    if json != machine_json(machine) {
        let found = String::from_utf8_lossy(json);
        return Err(unusable(
            path,
            &format!("it is of another machine: {found}"),
        ));
    }
    Ok(())
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let write = || File::create_new(path)?.write_all(bytes);
    write().map_err(failed("write", path))
}

fn unusable(path: &Path, problem: &str) -> Error {
    Error::Snapshot {
        path: path.to_owned(),
        problem: format!("{problem}; make the snapshot anew"),
    }
}

/// Adds step and path to an I/O error.
pub(super) fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path: PathBuf = path.to_owned();
    move |source| Error::File { step, path, source }
}
