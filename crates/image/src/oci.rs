//! Reads an OCI image layout and unpacks its layers into a root file system.
//!
//! An image is somebody else's file: sizes are capped, digests are checked, and nothing in it
//! names a path outside of the root it is unpacked into.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::Progress;
use crate::rootfs::{self, Defaults, Tree};

mod layer;
mod layout;
mod manifest;

use layout::Layout;
use manifest::{Config, Descriptor, Manifest};

/// Unpacked images larger than this are refused whatever the disk holds.
const UNPACKED_MAX: u64 = 64 * 1024 * 1024 * 1024;
/// Container engines stop at 127 layers.
const LAYERS_MAX: usize = 256;
/// Names without content cost memory and inodes too.
const ENTRIES_MAX: u64 = 4_000_000;

/// The image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file, or the part of an archive.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no layout.
    #[error("{path} is no OCI image layout: {reason}")]
    NotALayout {
        /// What was named.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: &'static str,
    },
    /// A JSON document in it is wrong.
    #[error("the image's {what} is not understood")]
    Document {
        /// Which document.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Something in it is not supported or not allowed.
    #[error("the image's {what} is refused: {reason}")]
    Refused {
        /// Which part.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// No image for this machine.
    #[error("the layout holds no linux/amd64 image; it holds: {found}")]
    Platform {
        /// What it holds.
        found: String,
    },
    /// Several images.
    #[error("the layout holds several images ({found}); copy the wanted one into its own layout")]
    Ambiguous {
        /// Their references.
        found: String,
    },
    /// Bytes are not those that the digest names.
    #[error("{digest} is corrupt: its content has another digest or size; fetch the image again")]
    Corrupt {
        /// The digest that the image names.
        digest: String,
    },
    /// Too much.
    #[error("the image is too large: more than {max} {what}")]
    TooLarge {
        /// The limit.
        max: u64,
        /// Of what.
        what: &'static str,
    },
    /// An entry cannot be put into the root.
    #[error("cannot unpack a layer")]
    Unpack(#[source] rootfs::TreeError),
    /// The caller asked to stop.
    #[error("unpacking was stopped on request")]
    Cancelled,
}

/// An image in a layout, with its manifest and configuration read and checked.
#[derive(Debug)]
pub struct Image {
    layout: Layout,
    digest: String,
    manifest: Manifest,
    config: Config,
}

impl Image {
    /// Opens a layout directory or an archive of one, and finds the image for this machine.
    pub fn open(path: &Path) -> Result<Image, Error> {
        let layout = Layout::open(path)?;
        let descriptor = manifest::find(&layout)?;
        let manifest: Manifest = layout.document(&descriptor, "manifest")?;
        if manifest.layers.len() > LAYERS_MAX {
            return Err(Error::TooLarge {
                max: LAYERS_MAX as u64,
                what: "layers",
            });
        }
        let config: Config = layout.document(&manifest.config, "configuration")?;
        if !config.fits() {
            return Err(Error::Platform {
                found: format!("{}/{}", config.os, config.architecture),
            });
        }
        Ok(Image {
            layout,
            digest: descriptor.digest,
            manifest,
            config,
        })
    }

    /// `sha256:…` of the manifest: what identifies the image.
    pub fn manifest_digest(&self) -> &str {
        &self.digest
    }

    /// Size of the layers as they are stored.
    pub fn layer_bytes(&self) -> u64 {
        self.manifest
            .layers
            .iter()
            .fold(0, |sum, layer| sum.saturating_add(layer.size))
    }

    /// Unpacks the layers into a new directory, using at most `budget` bytes.
    pub fn unpack(
        &self,
        root: &Path,
        budget: u64,
        progress: &mut dyn Progress,
    ) -> Result<Defaults, Error> {
        let made = fs::create_dir(root);
        made.map_err(|source| Error::Read {
            path: root.to_owned(),
            source,
        })?;
        let tree = Tree::open(root).map_err(Error::Unpack)?;
        let mut unpacker = layer::Unpacker::new(&tree, budget.min(UNPACKED_MAX), ENTRIES_MAX);
        for (index, layer) in self.manifest.layers.iter().enumerate() {
            progress.message(&format!(
                "unpacking layer {} of {} ({} KiB)",
                index + 1,
                self.manifest.layers.len(),
                layer.size.div_ceil(1024)
            ));
            self.unpack_layer(layer, &mut unpacker, progress)?;
        }
        if unpacker.skipped_devices() > 0 {
            let count = unpacker.skipped_devices();
            progress.message(&format!(
                "left out {count} device nodes; guests have their own /dev"
            ));
        }
        unpacker.finish()?;
        Ok(self.config.defaults())
    }

    fn unpack_layer(
        &self,
        layer: &Descriptor,
        unpacker: &mut layer::Unpacker<'_>,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let compression = layer.compression()?;
        let mut blob = self.layout.blob(layer)?;
        let unpacked = match compression {
            manifest::Compression::None => unpacker.apply(&mut blob, progress),
            manifest::Compression::Gzip => {
                unpacker.apply(&mut flate2::read::MultiGzDecoder::new(&mut blob), progress)
            }
            manifest::Compression::Zstd => match zstd::Decoder::new(&mut blob) {
                Ok(mut decoder) => unpacker.apply(&mut decoder, progress),
                Err(source) => Err(Error::Read {
                    path: layer.digest.clone().into(),
                    source,
                }),
            },
        };
        match unpacked {
            // Garbage is best explained by what it is: a blob that is not the one named.
            Err(error @ Error::Read { .. }) => match blob.verify() {
                Ok(()) => Err(error),
                Err(corrupt) => Err(corrupt),
            },
            Err(other) => Err(other),
            Ok(()) => blob.verify(),
        }
    }
}

#[cfg(test)]
mod tests;
