//! Access to the files of a layout, be it a directory or a tar archive, which is read in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::Error;
use super::manifest::{Descriptor, Index};

/// JSON documents larger than this are not what they say.
const DOCUMENT_MAX: u64 = 8 * 1024 * 1024;
/// An archive of a layout holds a few dozen files.
const ARCHIVE_ENTRIES_MAX: usize = 100_000;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

#[derive(Debug)]
pub(super) struct Layout {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Directory,
    /// Where each file lies in the archive: offset and size.
    Archive(HashMap<String, (u64, u64)>),
}

impl Layout {
    pub(super) fn open(path: &Path) -> Result<Layout, Error> {
        let failed = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        let kind = if metadata.is_dir() {
            Kind::Directory
        } else {
            let mut file = File::open(path).map_err(failed)?;
            let mut magic = [0; 2];
            let read = file.read(&mut magic).map_err(failed)?;
            if read == 2 && magic == GZIP_MAGIC {
                let reason = "the archive is compressed; unpack it first with gunzip";
                return Err(Error::NotALayout {
                    path: path.to_owned(),
                    reason,
                });
            }
            file.rewind().map_err(failed)?;
            Kind::Archive(list(path, file)?)
        };
        let layout = Layout {
            path: path.to_owned(),
            kind,
        };
        if !layout.has("index.json") {
            let reason = if layout.has("manifest.json") {
                "it is an archive of `docker save` in the old format; convert it with: skopeo copy \
                 docker-archive:FILE oci-archive:NEW"
            } else {
                "it has no index.json"
            };
            return Err(Error::NotALayout {
                path: path.to_owned(),
                reason,
            });
        }
        Ok(layout)
    }

    fn has(&self, name: &str) -> bool {
        match &self.kind {
            Kind::Directory => self.path.join(name).is_file(),
            Kind::Archive(files) => files.contains_key(name),
        }
    }

    pub(super) fn index(&self) -> Result<Index, Error> {
        let (reader, size) = self.file("index.json")?;
        let bytes = self.bounded(reader, size, "index.json")?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Document {
            what: "index",
            source,
        })
    }

    /// A JSON document, checked against its digest.
    pub(super) fn document<T: DeserializeOwned>(
        &self,
        descriptor: &Descriptor,
        what: &'static str,
    ) -> Result<T, Error> {
        if descriptor.size > DOCUMENT_MAX {
            return Err(Error::TooLarge {
                max: DOCUMENT_MAX,
                what: "bytes in a document",
            });
        }
        let mut blob = self.blob(descriptor)?;
        let mut bytes = Vec::new();
        blob.read_to_end(&mut bytes).map_err(|source| Error::Read {
            path: descriptor.digest.clone().into(),
            source,
        })?;
        blob.verify()?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Document { what, source })
    }

    /// A blob's bytes, to be verified by the reader when it has read them.
    pub(super) fn blob(&self, descriptor: &Descriptor) -> Result<Blob, Error> {
        let hex = descriptor.sha256()?;
        let (reader, size) = self.file(&format!("blobs/sha256/{hex}"))?;
        if size != descriptor.size {
            return Err(Error::Corrupt {
                digest: descriptor.digest.clone(),
            });
        }
        let (hasher, expected) = (Sha256::new(), hex.to_owned());
        Ok(Blob {
            reader,
            hasher,
            expected,
            digest: descriptor.digest.clone(),
        })
    }

    fn file(&self, name: &str) -> Result<(io::Take<File>, u64), Error> {
        let path = self.path.join(name);
        let failed = |source| Error::Read {
            path: path.clone(),
            source,
        };
        match &self.kind {
            Kind::Directory => {
                let file = File::open(&path).map_err(failed)?;
                let metadata = file.metadata().map_err(failed)?;
                if !metadata.is_file() {
                    return Err(failed(io::Error::other("not a plain file")));
                }
                Ok((file.take(metadata.len()), metadata.len()))
            }
            Kind::Archive(files) => {
                let missing = || failed(io::Error::from(io::ErrorKind::NotFound));
                let (offset, size) = *files.get(name).ok_or_else(missing)?;
                let mut file = File::open(&self.path).map_err(failed)?;
                file.seek(SeekFrom::Start(offset)).map_err(failed)?;
                Ok((file.take(size), size))
            }
        }
    }

    fn bounded(&self, mut reader: impl Read, size: u64, name: &str) -> Result<Vec<u8>, Error> {
        if size > DOCUMENT_MAX {
            return Err(Error::TooLarge {
                max: DOCUMENT_MAX,
                what: "bytes in a document",
            });
        }
        let mut bytes = Vec::new();
        reader
            .read_to_end(&mut bytes)
            .map_err(|source| Error::Read {
                path: self.path.join(name),
                source,
            })?;
        Ok(bytes)
    }
}

fn list(path: &Path, file: File) -> Result<HashMap<String, (u64, u64)>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let mut archive = tar::Archive::new(file);
    let mut files = HashMap::new();
    // Raw: the names that matter are short, and long-name records could be of any size.
    for entry in archive.entries_with_seek().map_err(failed)?.raw(true) {
        let entry = entry.map_err(failed)?;
        if entry.header().entry_type().is_file()
            && let Ok(name) = std::str::from_utf8(&entry.path_bytes())
        {
            let name = name.trim_start_matches("./").to_owned();
            files.insert(name, (entry.raw_file_position(), entry.size()));
        }
        if files.len() > ARCHIVE_ENTRIES_MAX {
            return Err(Error::TooLarge {
                max: ARCHIVE_ENTRIES_MAX as u64,
                what: "files",
            });
        }
    }
    Ok(files)
}

/// A blob being read and hashed.
#[derive(Debug)]
pub(super) struct Blob {
    reader: io::Take<File>,
    hasher: Sha256,
    expected: String,
    digest: String,
}

impl Blob {
    /// Reads what is left and compares the digest.
    pub(super) fn verify(mut self) -> Result<(), Error> {
        io::copy(&mut self, &mut io::sink()).map_err(|source| Error::Read {
            path: self.digest.clone().into(),
            source,
        })?;
        let found = self.hasher.finalize();
        let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        if found == self.expected {
            Ok(())
        } else {
            Err(Error::Corrupt {
                digest: self.digest,
            })
        }
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}
