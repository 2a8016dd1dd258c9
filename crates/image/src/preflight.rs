//! What can be known before a build starts: room on the disk.

use std::path::{Path, PathBuf};

/// There is not enough room, or it cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk is too full.
    #[error(
        "not enough disk space in {dir}: {need_mib} MiB needed, {have_mib} MiB free; free some or \
         choose another data directory"
    )]
    Full {
        /// Where.
        dir: PathBuf,
        /// What the build may need at most.
        need_mib: u64,
        /// What is free for us.
        have_mib: u64,
    },
    /// The file system does not say.
    #[error("cannot tell the free space of {dir}")]
    Unknown {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Bytes free for us on the file system of `dir`.
pub(crate) fn free_bytes(dir: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| Error::Unknown {
        dir: dir.to_owned(),
        source: e.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Refuses when fewer than `need` bytes are free.
pub(crate) fn room(dir: &Path, need: u64) -> Result<(), Error> {
    let have = free_bytes(dir)?;
    if have >= need {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1024 * 1024);
    Err(Error::Full {
        dir: dir.to_owned(),
        need_mib: mib(need),
        have_mib: have / (1024 * 1024),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn need_and_have_are_named() {
        let dir = std::env::temp_dir();
        room(&dir, 1).unwrap();
        let text = room(&dir, u64::MAX).unwrap_err().to_string();
        assert!(
            text.contains("MiB needed") && text.contains("MiB free"),
            "{text}"
        );
    }
}
