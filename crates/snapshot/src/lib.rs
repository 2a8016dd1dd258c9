//! The snapshot store: frozen machines on disk, published whole or not at all, and the lineage of
//! layers over each other.
//!
//! ```text
//!   <root>/<tag>/manifest.json   what it is: machine, image, lineage, size and hash of each file
//!                memory.bin      RAM, sparse: all of it, or the pages that differ from a base
//!                memory.idx      which pages those are (layers only)
//!                state.bin       device and CPU state, opaque
//!   <root>/.draft-<tag>/         being written by a living process, or left by a dead one
//!   <root>/.base-<id>/           without a tag, kept because layers lie over it
//!   <root>/.trash-…/             being deleted
//!   <root>/.lock                 held for moments while names change
//! ```
//!
//! Blocking. It knows no engine and no sandbox: what it is told about them it keeps, and gives back.
#![forbid(unsafe_code)]

mod check;
mod content;
mod draft;
mod error;
mod fault;
mod flatten;
mod id;
pub mod lineage;
mod manifest;
mod remove;
mod store;

pub use content::content_hash;
pub use draft::{Draft, ManifestDraft, MemoryDraft};
pub use error::{Damage, Error};
pub use id::{InvalidId, SnapshotId};
pub use manifest::{
    FileEntry, Image, Lineage, Machine, Manifest, Memory, SCHEMA_VERSION, SnapshotRef,
};
pub use remove::{Dependents, Removed};
pub use store::{Files, Layer, Listed, Pin, Snapshot, Status, Store, Usage};
