//! What can go wrong with the store, and with one snapshot in it.

use std::io;
use std::path::{Path, PathBuf};

use forkd_host::{file, sparse};
use forkd_wire::id::Tag;
use forkd_wire::layer;

use crate::id::SnapshotId;
use crate::lineage;
use crate::manifest::SCHEMA_VERSION;

/// An operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No snapshot has the tag.
    #[error("there is no snapshot {tag}; `forkd images` lists those there are")]
    NotFound {
        /// The tag asked for.
        tag: Tag,
    },
    /// The tag is taken.
    #[error(
        "snapshot {tag} exists already; choose another tag or remove it with `forkd rmi {tag}`"
    )]
    Exists {
        /// The tag.
        tag: Tag,
    },
    /// Somebody writes a snapshot of this tag.
    #[error("snapshot {tag} is being written; wait for it or choose another tag")]
    InProgress {
        /// The tag.
        tag: Tag,
    },
    /// Templates or sandboxes use the snapshot.
    #[error("snapshot {tag} is in use; kill its sandboxes first, with `forkd kill --tag {tag}`")]
    InUse {
        /// The tag.
        tag: Tag,
    },
    /// Layers lie over the snapshot.
    #[error(
        "snapshot {tag} is the base of {}; remove those first or all of them with --cascade",
        join(.dependents)
    )]
    HasDependents {
        /// The tag.
        tag: Tag,
        /// What would be lost with it, outermost first.
        dependents: Vec<Tag>,
    },
    /// The snapshot is not what its manifest says.
    #[error("snapshot {tag} is unusable; remove it with `forkd rmi {tag}` and build it again")]
    Damaged {
        /// The tag.
        tag: Tag,
        /// What is wrong with it.
        #[source]
        damage: Damage,
    },
    /// The files that were to be published are not a snapshot.
    #[error("snapshot {tag} cannot be published")]
    Unpublishable {
        /// The tag.
        tag: Tag,
        /// What is wrong with them.
        #[source]
        damage: Damage,
    },
    /// The file system is full.
    #[error("no space is left in {path}; free some, or choose another directory, and try again")]
    NoSpace {
        /// The store's directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Less space is free than was asked for.
    #[error(transparent)]
    Space(file::Error),
    /// A step on a file failed.
    #[error("the snapshot store failed")]
    File {
        /// The cause, with the path.
        #[source]
        source: file::Error,
    },
    /// Reading or copying the content of a file failed.
    #[error("cannot process {path}")]
    Content {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: sparse::Error,
    },
    /// The operating system gives no random numbers.
    #[error("cannot make a snapshot id")]
    Random {
        /// The cause.
        #[source]
        source: getrandom::Error,
    },
    /// The manifest cannot be written as JSON, or is too long.
    #[error("the manifest of {tag} cannot be written; make its labels and facts smaller")]
    Manifest {
        /// The tag.
        tag: Tag,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What is wrong with one snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// A file of it cannot be read.
    #[error("a file cannot be read")]
    File {
        /// The cause, with the path.
        #[source]
        source: file::Error,
    },
    /// The content of a file cannot be read.
    #[error("{path} cannot be read")]
    Content {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: sparse::Error,
    },
    /// The manifest is no JSON of the expected shape.
    #[error("{path} is no manifest")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is of another version.
    #[error(
        "{path} has schema version {found}, this forkd reads version {SCHEMA_VERSION}; use the version of forkd that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version found.
        found: u64,
    },
    /// The manifest says something that cannot be.
    #[error("{path} says {field} is {found}, expected {expected}")]
    Field {
        /// The manifest.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A file that must be there is not.
    #[error("{path} is missing")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file was cut or has grown.
    #[error("{path} has {found} bytes, expected {expected}")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The size it should have.
        expected: u64,
    },
    /// A file's content changed.
    #[error("{path} has blake3 {found}, expected {expected}")]
    Hash {
        /// The file.
        path: PathBuf,
        /// Its hash.
        found: String,
        /// The hash it should have.
        expected: String,
    },
    /// The layer's index is damaged.
    #[error("{path} is no layer index")]
    Index {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: layer::Error,
    },
    /// The snapshot below is gone.
    #[error("it lies over snapshot {tag} with id {id}, which is gone")]
    BaseMissing {
        /// The tag the base had.
        tag: Tag,
        /// The base's id.
        id: SnapshotId,
    },
    /// The snapshot below is unusable itself.
    #[error("it lies over snapshot {tag}, which is unusable")]
    Base {
        /// The base's tag.
        tag: Tag,
        /// What is wrong with it.
        #[source]
        damage: Box<Damage>,
    },
    /// The layers make no chain.
    #[error("its layers make no chain")]
    Lineage {
        /// Why.
        #[source]
        source: lineage::Error,
    },
}

impl From<lineage::Error> for Damage {
    fn from(source: lineage::Error) -> Damage {
        Damage::Lineage { source }
    }
}

impl From<file::Error> for Damage {
    fn from(source: file::Error) -> Damage {
        Damage::File { source }
    }
}

impl Error {
    /// A failed step on a file; a full disk gets its own variant.
    pub(crate) fn file(source: file::Error) -> Error {
        match source {
            file::Error::Io { path, source, .. } if is_full(&source) => {
                Error::NoSpace { path, source }
            }
            source @ file::Error::Space { .. } => Error::Space(source),
            source => Error::File { source },
        }
    }

    /// A failed step on a file's content; a full disk gets its own variant.
    pub(crate) fn content(path: &Path) -> impl FnOnce(sparse::Error) -> Error {
        let path = path.to_owned();
        move |source| match source {
            sparse::Error::Write { source, .. } | sparse::Error::Resize { source, .. }
                if is_full(&source) =>
            {
                Error::NoSpace { path, source }
            }
            source => Error::Content { path, source },
        }
    }

    /// What is wrong with a snapshot.
    pub(crate) fn damaged(tag: &Tag) -> impl FnOnce(Damage) -> Error {
        let tag = tag.clone();
        move |damage| Error::Damaged { tag, damage }
    }
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn join(tags: &[Tag]) -> String {
    let tags: Vec<&str> = tags.iter().map(Tag::as_str).collect();
    tags.join(", ")
}
