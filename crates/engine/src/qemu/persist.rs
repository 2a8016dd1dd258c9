//! What is written down: the kind of a snapshot's state file, and a VM's record for the next daemon.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::NAME;
use crate::statefile::{Format, Shape};

/// QEMU reads its part from the file at the offset where it begins.
pub(super) const STATE: Format = Format {
    magic: *b"FKDQEMU1",
    engine: NAME,
};

/// What the next daemon must know of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The VM's id.
    pub(super) id: String,
    /// The machine.
    pub(super) shape: Shape,
    /// The file RAM is mapped from.
    pub(super) ram: PathBuf,
    /// Whether RAM *is* that file; otherwise pages that were written are private to the process.
    pub(super) shared: bool,
}
