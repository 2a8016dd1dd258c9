//! What is written down for the next daemon: a VM's record.

use serde::{Deserialize, Serialize};

/// What the next daemon must know of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The VM's id.
    pub(super) id: String,
    /// Whether it was booted, so that there is nothing it could be a layer over.
    pub(super) booted: bool,
}
