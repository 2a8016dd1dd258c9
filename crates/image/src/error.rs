//! What can go wrong with an image, by step.

use std::io;
use std::path::PathBuf;

use crate::{digest, initramfs, kernel, name, rootfs};

/// An operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name is not acceptable.
    #[error("the image's name is refused")]
    Name(#[source] name::Error),
    /// No such image.
    #[error("there is no image `{0}`; see `forkd image ls`, or make it with `forkd image build`")]
    NotFound(String),
    /// A digest's beginning fits several images.
    #[error("`{0}` fits several images; give more digits of the digest, or a name")]
    Ambiguous(String),
    /// The kernel failed.
    #[error("cannot provide a kernel")]
    Kernel(#[source] kernel::Error),
    /// The root file system failed.
    #[error("cannot provide a root file system")]
    Rootfs(#[source] rootfs::Error),
    /// The initramfs failed.
    #[error("cannot write the initramfs")]
    Initramfs(#[source] initramfs::Error),
    /// Hashing failed.
    #[error("cannot hash what was built")]
    Digest(#[source] digest::Error),
    /// The store cannot be read or written.
    #[error("cannot {step} {path}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A record is damaged.
    #[error("{path} is damaged; remove it and build the image again")]
    Damaged {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A record is of another version of forkd.
    #[error(
        "{path} has format {found}, this forkd reads format {known}; remove it and build the \
         image again"
    )]
    Version {
        /// The record.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Parts of an image are gone or cut short.
    #[error("the image `{name}` lacks {path} or has it damaged; build it again")]
    Incomplete {
        /// The image.
        name: String,
        /// The missing part.
        path: PathBuf,
    },
    /// The caller asked to stop.
    #[error("the build was stopped on request; nothing was kept of the unfinished part")]
    Cancelled,
}
