//! What is written down: the kind of a snapshot's state file, and a VM's record for the next daemon.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::NAME;
use crate::statefile::{Format, Shape};

/// The head is taken off before Firecracker reads the rest.
pub(super) const STATE: Format = Format {
    magic: *b"FKDFIRE1",
    engine: NAME,
};

/// What the next daemon must know of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The VM's id.
    pub(super) id: String,
    /// The machine.
    pub(super) shape: Shape,
    /// The file that a fork maps its RAM from; a booted VM has none.
    pub(super) base: Option<PathBuf>,
    /// The user it runs as, in a root of its own; absent without a jail.
    pub(super) user: Option<u32>,
}
