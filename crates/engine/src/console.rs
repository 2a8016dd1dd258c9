//! The guest's console, from a socket or pipe into a file that a talkative guest cannot grow without end.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes the file may have; beyond them its older half goes.
const SIZE_MAX: u64 = 1 << 20;
/// Bytes read at once.
const CHUNK: usize = 16 * 1024;

/// A file that keeps the end of what is written to it.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Log {
    /// Opens or creates the file; goes on at its end.
    pub(crate) fn open(path: &Path) -> io::Result<Log> {
        let mut file = File::options()
            .create(true)
            .append(true)
            .read(true)
            .open(path)?;
        let size = file.seek(SeekFrom::End(0))?;
        let path = path.to_owned();
        Ok(Log { path, file, size })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size + bytes.len() as u64 > SIZE_MAX {
            self.halve()?;
        }
        self.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// Replaces the file by its newer half, so that a reader sees the old one or the new.
    fn halve(&mut self) -> io::Result<()> {
        let keep = SIZE_MAX / 2;
        let mut tail = Vec::new();
        self.file
            .seek(SeekFrom::Start(self.size.saturating_sub(keep)))?;
        (&self.file).take(keep).read_to_end(&mut tail)?;
        let fresh = self.path.with_extension("tmp");
        std::fs::write(&fresh, &tail)?;
        std::fs::rename(&fresh, &self.path)?;
        *self = Log::open(&self.path)?;
        Ok(())
    }
}

/// Writes down what comes until the channel ends. A file that cannot be written loses console, no more:
/// the channel is read on, so that the guest never waits.
pub(crate) async fn pump(mut channel: impl AsyncRead + Unpin, path: PathBuf) {
    let mut log = Log::open(&path);
    let mut buffer = vec![0; CHUNK];
    while let Ok(read @ 1..) = channel.read(&mut buffer).await {
        // Short writes into the page cache; a thread's hop would cost more.
        let Ok(open) = &mut log else { continue };
        if let Err(error) = open.write(&buffer[..read]) {
            tracing::warn!(%error, path = %path.display(), "console is no longer written down");
            log = Err(error);
        }
    }
}
