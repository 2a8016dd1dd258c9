//! The record of an image: `images/NAME/image.json`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Image, blob, io_error};
use crate::digest::Digest;
use crate::{Error, name};

pub(super) const SCHEMA_VERSION: u32 = 1;
const FILE: &str = "image.json";

/// The parts of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) schema_version: u32,
    pub(super) name: String,
    pub(super) digest: Digest,
    pub(super) kernel: Digest,
    pub(super) initramfs: Digest,
    pub(super) rootfs: Digest,
    pub(super) kernel_version: String,
    pub(super) kernel_origin: String,
    pub(super) source: String,
    /// Seconds since the epoch.
    pub(super) created_at: u64,
}

/// A name, or a displaced image's `NAME@DIGEST`.
pub(super) fn is_record_name(text: &str) -> bool {
    let (plain, digest) = text.split_once('@').unwrap_or((text, "0"));
    name::image(plain).is_ok()
        && (1..=64).contains(&digest.len())
        && digest.bytes().all(|b| b.is_ascii_hexdigit())
}

pub(super) fn path(store: &Path, name: &str) -> PathBuf {
    store.join("images").join(name).join(FILE)
}

impl Record {
    pub(super) fn read(store: &Path, name: &str) -> Result<Record, Error> {
        #[derive(Deserialize)]
        struct Version {
            schema_version: u32,
        }
        let path = path(store, name);
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        let damaged = |source| Error::Damaged {
            path: path.clone(),
            source,
        };
        let Version {
            schema_version: found,
        } = serde_json::from_slice(&bytes).map_err(damaged)?;
        if found != SCHEMA_VERSION {
            return Err(Error::Version {
                path,
                found,
                known: SCHEMA_VERSION,
            });
        }
        let mut record: Record = serde_json::from_slice(&bytes).map_err(damaged)?;
        // A displaced image is renamed on disk only.
        record.name = name.to_owned();
        Ok(record)
    }

    /// Writes the record into a new directory, durably.
    pub(super) fn write(&self, dir: &Path) -> Result<(), Error> {
        fs::create_dir(dir).map_err(io_error("create", dir))?;
        let json = serde_json::to_vec_pretty(self).expect("plain fields");
        super::sweep::write_file(&dir.join(FILE), &json)?;
        super::sweep::sync_dir(dir)
    }

    /// Whether two records differ in nothing but when they were written.
    pub(super) fn same_image(&self, other: &Record) -> bool {
        let created_at = self.created_at;
        *self
            == Record {
                created_at,
                ..other.clone()
            }
    }

    pub(super) fn blob_names(&self) -> [String; 3] {
        [
            blob::name(blob::Kind::Kernel, &self.kernel),
            blob::name(blob::Kind::Initramfs, &self.initramfs),
            blob::name(blob::Kind::Rootfs, &self.rootfs),
        ]
    }

    /// The image with its paths, having looked that all its files are there at full length.
    pub(super) fn image(self, store: &Path) -> Result<Image, Error> {
        let [kernel, initramfs, rootfs] = self.blob_names().map(|n| blob::path(store, &n));
        let mut size_bytes = 0;
        for dir in [&kernel, &initramfs, &rootfs] {
            match blob::Manifest::read(dir).filter(|manifest| manifest.complete(dir)) {
                Some(manifest) => size_bytes += manifest.size_bytes(),
                None => {
                    return Err(Error::Incomplete {
                        name: self.name,
                        path: dir.clone(),
                    });
                }
            }
        }
        let vmlinux = Some(kernel.join(blob::VMLINUX)).filter(|path| path.is_file());
        Ok(Image {
            dir: store.join("images").join(&self.name),
            name: self.name,
            digest: self.digest,
            kernel: kernel.join(blob::VMLINUZ),
            vmlinux,
            initramfs: initramfs.join(blob::INITRAMFS),
            rootfs: rootfs.join(blob::ROOTFS),
            kernel_version: self.kernel_version,
            size_bytes,
            created_at: SystemTime::UNIX_EPOCH + Duration::from_secs(self.created_at),
            source: self.source,
        })
    }
}
