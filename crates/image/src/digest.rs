//! Content digests: blake3, with what is hashed kept apart by purpose.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// More entries than this in one tree are a mistake (a walk of `/`, a bind loop), not an image.
const TREE_ENTRIES_MAX: u64 = 5_000_000;

/// A blake3 digest as 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// Reading what was to be hashed failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A directory holds far more than an image would.
    #[error("{path} holds more than {TREE_ENTRIES_MAX} files")]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

impl Digest {
    /// All 64 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve digits, for people.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }

    /// A UUID made of the digest, for formats that carry one.
    pub fn uuid(&self) -> String {
        let h = &self.0;
        // Version 8 ("custom") and the standard variant, so that tools accept it as a UUID.
        format!(
            "{}-{}-8{}-a{}-{}",
            &h[..8],
            &h[8..12],
            &h[13..16],
            &h[17..20],
            &h[20..32]
        )
    }

    /// The digest of a value's JSON, under the name of its purpose.
    pub fn of_json<T: Serialize>(purpose: &str, value: &T) -> Digest {
        let json = serde_json::to_vec(value).expect("our own types have only string keys");
        let mut hasher = blake3::Hasher::new();
        hasher.update(purpose.as_bytes()).update(&[0]).update(&json);
        Digest(hasher.finalize().to_hex().to_string())
    }

    /// The digest of bytes.
    pub fn of_bytes(bytes: &[u8]) -> Digest {
        Digest(blake3::hash(bytes).to_hex().to_string())
    }

    /// The digest of a file's bytes.
    pub fn of_file(path: &Path) -> Result<Digest, Error> {
        let failed = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(failed)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => return Ok(Digest(hasher.finalize().to_hex().to_string())),
                n => hasher.update(&buffer[..n]),
            };
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Digest, String> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 64 && text.bytes().all(hex) {
            Ok(Digest(text))
        } else {
            Err(format!("`{text}` is not a digest of 64 hexadecimal digits"))
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a walk of a directory found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// Changes whenever an entry is added, removed, written or given other attributes.
    pub digest: Digest,
    /// Sum of the file sizes.
    pub bytes: u64,
    /// Number of entries.
    pub entries: u64,
}

/// Walks a directory without following links. Files are told apart by their metadata (size,
/// modification and change time, owner, mode), not by their bytes: a walk of a large root
/// takes milliseconds, and any write moves the change time.
pub fn tree(root: &Path) -> Result<Tree, Error> {
    let mut walk = Walk {
        hasher: blake3::Hasher::new(),
        bytes: 0,
        entries: 0,
    };
    // Iterative, because the depth is the directory's choice.
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        let failed = |source| Error::Read {
            path: dir.clone(),
            source,
        };
        let mut children = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            children.push(entry.map_err(failed)?.path());
        }
        children.sort();
        for path in children {
            let metadata = fs::symlink_metadata(&path).map_err(|source| Error::Read {
                path: path.clone(),
                source,
            })?;
            walk.add(path.strip_prefix(root).unwrap_or(&path), &metadata);
            if walk.entries > TREE_ENTRIES_MAX {
                return Err(Error::TooMany {
                    path: root.to_owned(),
                });
            }
            if metadata.is_dir() {
                pending.push(path);
            }
        }
    }
    let digest = Digest(walk.hasher.finalize().to_hex().to_string());
    Ok(Tree {
        digest,
        bytes: walk.bytes,
        entries: walk.entries,
    })
}

struct Walk {
    hasher: blake3::Hasher,
    bytes: u64,
    entries: u64,
}

impl Walk {
    fn add(&mut self, path: &Path, m: &Metadata) {
        let path = path.as_os_str().as_bytes();
        self.hasher
            .update(&(path.len() as u64).to_le_bytes())
            .update(path);
        for number in [
            u64::from(m.mode()),
            u64::from(m.uid()),
            u64::from(m.gid()),
            m.rdev(),
        ] {
            self.hasher.update(&number.to_le_bytes());
        }
        // A directory's own times and size say nothing that its entries do not.
        if !m.is_dir() {
            self.hasher.update(&m.size().to_le_bytes());
            for time in [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()] {
                self.hasher.update(&time.to_le_bytes());
            }
        }
        if m.is_file() {
            self.bytes += m.size();
        }
        self.entries += 1;
    }
}

#[cfg(test)]
mod tests;
