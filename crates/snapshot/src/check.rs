//! Reading a snapshot's directory, believing nothing: each check costs a few system calls, except the
//! hash, which costs reading the file.

use std::fs::File;
use std::io;
use std::path::Path;

use forkd_host::{file, sparse};
use forkd_wire::layer::Index;

use crate::content::content_hash;
use crate::error::Damage;
use crate::manifest::{
    DecodeError, INDEX, MANIFEST, MANIFEST_BYTES_MAX, MEMORY, Manifest, Memory, STATE,
};
use crate::store::{Files, Layer, Snapshot};

/// Reads a manifest and checks that the files it lists are there, with their sizes.
pub(crate) fn load(dir: &Path) -> Result<Snapshot, Damage> {
    let manifest = load_manifest(&dir.join(MANIFEST))?;
    for name in file_names(&manifest.memory) {
        let path = dir.join(name);
        let Some(entry) = manifest.file(name) else {
            return Err(Damage::Field {
                path: dir.join(MANIFEST),
                field: "files",
                found: format!("without {name}"),
                expected: file_names(&manifest.memory).join(", "),
            });
        };
        let found = file_size(&path)?;
        check_size(&path, found, entry.size)?;
    }
    Ok(Snapshot {
        dir: dir.to_owned(),
        manifest,
    })
}

/// Reads a manifest alone.
pub(crate) fn load_manifest(path: &Path) -> Result<Manifest, Damage> {
    file_size(path)?;
    let bytes = file::read_bounded(path, MANIFEST_BYTES_MAX)?;
    let path = path.to_owned();
    let manifest = Manifest::decode(&bytes).map_err(|error| match error {
        DecodeError::Syntax(source) => Damage::Manifest {
            path: path.clone(),
            source,
        },
        DecodeError::Version { found } => Damage::Version {
            path: path.clone(),
            found,
        },
    })?;
    let known = file_names(&manifest.memory);
    match manifest
        .files
        .iter()
        .find(|file| !known.contains(&&*file.name))
    {
        // Also keeps a name with a separator from leading out of the directory.
        Some(stranger) => Err(Damage::Field {
            path,
            field: "files",
            found: format!("{:?}", stranger.name),
            expected: known.join(", "),
        }),
        None => Ok(manifest),
    }
}

/// Checks that layers fit over their base, and names the files.
pub(crate) fn head_and_files(mut chain: Vec<Snapshot>) -> Result<(Snapshot, Files), Damage> {
    let file = |snapshot: &Snapshot, name| snapshot.dir.join(name);
    let memory = file(&chain[0], MEMORY);
    let memory_bytes = file_size(&memory)?;
    let mut layers = Vec::new();
    for snapshot in &chain[1..] {
        let layer = Layer {
            memory: file(snapshot, MEMORY),
            index: file(snapshot, INDEX),
        };
        check_size(&layer.memory, file_size(&layer.memory)?, memory_bytes)?;
        read_index(&layer.index, memory_bytes)?;
        layers.push(layer);
    }
    let head = chain.swap_remove(chain.len() - 1);
    let state = file(&head, STATE);
    let files = Files {
        memory,
        layers,
        state,
    };
    Ok((head, files))
}

/// Reads a layer's index, which must be for this much memory.
pub(crate) fn read_index(path: &Path, memory_bytes: u64) -> Result<Index, Damage> {
    file_size(path)?;
    let bytes = file::read_bounded(path, Index::encoded_len_max(memory_bytes))?;
    let index = Index::decode(&bytes).map_err(|source| Damage::Index {
        path: path.to_owned(),
        source,
    })?;
    if index.memory_bytes() == memory_bytes {
        return Ok(index);
    }
    Err(Damage::Field {
        path: path.to_owned(),
        field: "the size of memory",
        found: index.memory_bytes().to_string(),
        expected: memory_bytes.to_string(),
    })
}

fn check_size(path: &Path, found: u64, expected: u64) -> Result<(), Damage> {
    if found == expected {
        return Ok(());
    }
    Err(Damage::Size {
        path: path.to_owned(),
        found,
        expected,
    })
}

pub(crate) fn check_hash(path: &Path, expected: &str) -> Result<(), Damage> {
    let found = content_hash(&open(path)?).map_err(|source| Damage::Content {
        path: path.to_owned(),
        source,
    })?;
    if found == expected {
        return Ok(());
    }
    Err(Damage::Hash {
        path: path.to_owned(),
        found,
        expected: expected.to_owned(),
    })
}

/// The files of a snapshot beside its manifest.
pub(crate) fn file_names(memory: &Memory) -> &'static [&'static str] {
    match memory {
        Memory::Full => &[MEMORY, STATE],
        Memory::Layer { .. } => &[MEMORY, INDEX, STATE],
    }
}

/// The size of a regular file that must exist.
pub(crate) fn file_size(path: &Path) -> Result<u64, Damage> {
    // Not followed: a link in a snapshot could lead anywhere.
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_file() => Ok(metadata.len()),
        Ok(_) => Err(Damage::Missing {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Damage::Missing {
            path: path.to_owned(),
        }),
        Err(source) => Err(Damage::Content {
            path: path.to_owned(),
            source: sparse::Error::Stat { source },
        }),
    }
}

pub(crate) fn open(path: &Path) -> Result<File, Damage> {
    File::open(path).map_err(|source| Damage::File {
        source: file::Error::Io {
            step: "open",
            path: path.to_owned(),
            source,
        },
    })
}
