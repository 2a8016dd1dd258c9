//! What is written down for the next daemon: a VM's record.

use std::path::Path;

use forkd_host::file::read_bounded;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::rundir::failed;

/// What the next daemon must know of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The VM's id.
    pub(super) id: String,
    /// Whether it was booted, so that there is nothing it could be a layer over.
    pub(super) booted: bool,
}

impl Record {
    /// The most bytes a record can have.
    const SIZE_MAX: u64 = 64 << 10;

    pub(super) fn write(&self, path: &Path) -> Result<(), Error> {
        let bytes =
            serde_json::to_vec(self).map_err(|error| failed("encode", path)(error.into()))?;
        std::fs::write(path, bytes).map_err(failed("write", path))
    }

    /// `None`: there is none, or none that can be understood.
    pub(super) fn read(path: &Path) -> Option<Record> {
        let bytes = read_bounded(path, Record::SIZE_MAX).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}
