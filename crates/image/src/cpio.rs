//! Writes a newc cpio archive, the format the kernel unpacks as its first root file system.
//!
//! Everything is owned by root and dated at the epoch, so that the same entries always give the
//! same bytes. Parents must be written before what they contain; the kernel creates nothing on
//! its own.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";

/// An archive being written.
#[derive(Debug)]
pub struct Archive<W: Write> {
    out: W,
    inode: u32,
    written: u64,
}

impl<W: Write> Archive<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Archive<W> {
        Archive {
            out,
            inode: 0,
            written: 0,
        }
    }

    /// Adds a directory. Paths are relative to the root: `modules`, not `/modules`.
    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path, DIRECTORY | mode, 2, (0, 0), &[])
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | mode, 1, (0, 0), content)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, SYMLINK | 0o777, 1, (0, 0), target.as_bytes())
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | mode, 1, (major, minor), &[])
    }

    /// Ends the archive and gives the writer back, unflushed.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.header(TRAILER, 0, 1, (0, 0), 0)?;
        // Whole sectors, as block devices and boot loaders expect.
        self.pad(512)?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        if path.is_empty() || path.starts_with('/') || path == TRAILER || path.contains('\0') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("`{path}` cannot be a path in an archive"),
            ));
        }
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("`{path}` exceeds 4 GiB"),
            )
        })?;
        self.inode += 1;
        self.header(path, mode, links, device, size)?;
        self.write(content)?;
        self.pad(4)
    }

    fn header(
        &mut self,
        path: &str,
        mode: u32,
        links: u32,
        (major, minor): (u32, u32),
        size: u32,
    ) -> io::Result<()> {
        let inode = self.inode;
        let name_size = path.len() + 1;
        // magic, inode, mode, uid, gid, links, mtime, size, device, device number, name size, sum
        let header = format!(
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}\
             {major:08x}{minor:08x}{name_size:08x}{:08x}",
            0, 0, 0, 0, 0, 0
        );
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad(4)
    }

    fn pad(&mut self, to: u64) -> io::Result<()> {
        let missing = (to - self.written % to) % to;
        self.write(&[0; 512][..missing as usize])
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

#[cfg(test)]
mod tests;
