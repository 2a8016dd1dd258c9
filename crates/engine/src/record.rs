//! What is written down about a running VM for the next daemon: a small file in its directory.

use std::path::Path;

use forkd_host::file::read_bounded;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;
use crate::rundir::failed;

/// The most bytes a record can have.
const SIZE_MAX: u64 = 64 << 10;

pub(crate) fn write(path: &Path, record: &impl Serialize) -> Result<(), Error> {
    let bytes = serde_json::to_vec(record).map_err(|error| failed("encode", path)(error.into()))?;
    std::fs::write(path, bytes).map_err(failed("write", path))
}

/// `None`: there is none, or none that can be understood.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = read_bounded(path, SIZE_MAX).ok()?;
    serde_json::from_slice(&bytes).ok()
}
