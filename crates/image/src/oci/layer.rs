//! Applies layers to a root: files, links, whiteouts. The only code that meets a layer's entries.
//!
//! The archive is read entry by entry in raw form; long names and extended headers are taken up
//! here, with a limit on each, because a reader that collects them itself collects any size.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tar::{Entry, EntryType, PaxExtensions};

use super::Error;
use crate::Progress;
use crate::rootfs::tree::{Attributes, Place, relative};
use crate::rootfs::{Tree, TreeError};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names that begin so belong to a file system that no longer exists.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const LONG_NAME_MAX: u64 = 8 * 1024;
const EXTENDED_MAX: u64 = 1024 * 1024;
/// How many entries pass between two questions whether to go on.
const CANCEL_EVERY: u64 = 64;
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

pub(super) struct Unpacker<'a> {
    tree: &'a Tree,
    bytes_left: u64,
    bytes_max: u64,
    entries: u64,
    entries_max: u64,
    devices: u64,
    /// Writing into a directory moves its time, so times of directories are set at the end.
    times: HashMap<PathBuf, i64>,
}

/// What precedes an entry and is about it.
#[derive(Default)]
struct Extra {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    size: Option<u64>,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

fn refused(reason: String) -> Error {
    Error::Refused {
        what: "layer",
        reason,
    }
}

fn read_error(source: std::io::Error) -> Error {
    Error::Read {
        path: "the layer's archive".into(),
        source,
    }
}

impl<'a> Unpacker<'a> {
    pub(super) fn new(tree: &'a Tree, bytes_max: u64, entries_max: u64) -> Unpacker<'a> {
        let times = HashMap::new();
        Unpacker {
            tree,
            bytes_left: bytes_max,
            bytes_max,
            entries: 0,
            entries_max,
            devices: 0,
            times,
        }
    }

    pub(super) fn skipped_devices(&self) -> u64 {
        self.devices
    }

    /// Applies one layer.
    pub(super) fn apply(
        &mut self,
        layer: &mut dyn Read,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let mut archive = tar::Archive::new(layer);
        // What this layer brought; a whiteout hides only what lies below.
        let mut own: HashSet<PathBuf> = HashSet::new();
        let mut extra = Extra::default();
        for entry in archive.entries().map_err(read_error)?.raw(true) {
            let mut entry = entry.map_err(read_error)?;
            self.entries += 1;
            if self.entries > self.entries_max {
                return Err(Error::TooLarge {
                    max: self.entries_max,
                    what: "entries",
                });
            }
            if self.entries.is_multiple_of(CANCEL_EVERY) && progress.cancelled() {
                return Err(Error::Cancelled);
            }
            match entry.header().entry_type() {
                EntryType::GNULongName => extra.path = Some(long_name(&mut entry)?),
                EntryType::GNULongLink => extra.link = Some(long_name(&mut entry)?),
                EntryType::XHeader => extra.extend(&mut entry)?,
                EntryType::XGlobalHeader => {}
                _ => self.entry(&mut entry, std::mem::take(&mut extra), &mut own)?,
            }
        }
        Ok(())
    }

    /// Sets the directories' times, once nothing more will be written.
    pub(super) fn finish(self) -> Result<(), Error> {
        self.tree
            .date_directories(&self.times)
            .map_err(Error::Unpack)
    }

    fn entry(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        extra: Extra,
        own: &mut HashSet<PathBuf>,
    ) -> Result<(), Error> {
        let raw = extra
            .path
            .clone()
            .unwrap_or_else(|| entry.path_bytes().into_owned());
        let path = relative(&raw).map_err(Error::Unpack)?;
        let attributes = extra.attributes(entry)?;
        let Some(name) = path.file_name() else {
            // The root itself: its attributes are ours.
            return Ok(());
        };
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return self.whiteout(&path, name.as_bytes(), hidden, own);
        }
        let place = self.tree.place(&path).map_err(Error::Unpack)?;
        let put = match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                return self.file(entry, &extra, &place, &attributes, own);
            }
            EntryType::Directory => {
                self.times.insert(place.real.clone(), attributes.mtime);
                self.tree.directory(&place, &attributes)
            }
            EntryType::Symlink => self
                .tree
                .symlink(&place, &extra.link_of(entry)?, &attributes),
            EntryType::Link => self.hard_link(&place, &extra.link_of(entry)?),
            EntryType::Fifo => self.tree.fifo(&place, &attributes),
            EntryType::Char | EntryType::Block => {
                self.devices += 1;
                return Ok(());
            }
            other => {
                let path = path.display();
                return Err(refused(format!(
                    "{path} is an entry of unknown kind {other:?}"
                )));
            }
        };
        put.map_err(Error::Unpack)?;
        remember(own, &place.real);
        Ok(())
    }

    fn file(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        extra: &Extra,
        place: &Place,
        attributes: &Attributes,
        own: &mut HashSet<PathBuf>,
    ) -> Result<(), Error> {
        let size = entry.size();
        if extra.size.is_some_and(|named| named != size) {
            // Only files beyond 8 GiB have their size in the extended header alone.
            return Err(refused(format!("{} exceeds 8 GiB", place.real.display())));
        }
        if size > self.bytes_left {
            return Err(Error::TooLarge {
                max: self.bytes_max,
                what: "bytes",
            });
        }
        self.bytes_left -= size;
        let mut content = Source {
            inner: entry,
            failed: None,
        };
        let written = self.tree.file(place, &mut content, attributes);
        if let Some(source) = content.failed {
            return Err(read_error(source));
        }
        if written.map_err(Error::Unpack)? != size {
            return Err(read_error(std::io::ErrorKind::UnexpectedEof.into()));
        }
        remember(own, &place.real);
        Ok(())
    }

    fn hard_link(&self, place: &Place, target: &[u8]) -> Result<(), TreeError> {
        let target = relative(target)?;
        self.tree.hard_link(place, &self.tree.place(&target)?)
    }

    fn whiteout(
        &self,
        path: &Path,
        name: &[u8],
        hidden: &[u8],
        own: &HashSet<PathBuf>,
    ) -> Result<(), Error> {
        let dir = path.parent().unwrap_or_else(|| Path::new(""));
        if name == OPAQUE {
            return self.hide_all(dir, own).map_err(Error::Unpack);
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(());
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            let path = path.display();
            return Err(refused(format!("the whiteout {path} names nothing")));
        }
        self.hide(&dir.join(OsStr::from_bytes(hidden)), own)
            .map_err(Error::Unpack)
    }

    /// Hides what lower layers have at a path; what this layer brought stays.
    fn hide(&self, path: &Path, own: &HashSet<PathBuf>) -> Result<(), TreeError> {
        let place = self.tree.place(path)?;
        if !own.contains(&place.real) {
            self.tree.clear(&place)
        } else if self.tree.is_directory(&place) {
            self.hide_all(path, own)
        } else {
            Ok(())
        }
    }

    fn hide_all(&self, dir: &Path, own: &HashSet<PathBuf>) -> Result<(), TreeError> {
        // Iterative, because the depth is the archive's choice.
        let mut pending = vec![dir.to_owned()];
        while let Some(dir) = pending.pop() {
            for name in self.tree.names(&dir)? {
                let path = dir.join(name);
                let place = self.tree.place(&path)?;
                if !own.contains(&place.real) {
                    self.tree.clear(&place)?;
                } else if self.tree.is_directory(&place) {
                    pending.push(path);
                }
            }
        }
        Ok(())
    }
}

impl Extra {
    fn extend(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<(), Error> {
        let data = limited(entry, EXTENDED_MAX)?;
        for extension in PaxExtensions::new(&data) {
            let extension = extension.map_err(read_error)?;
            let (key, value) = (extension.key_bytes(), extension.value_bytes());
            let text = std::str::from_utf8(value).unwrap_or_default();
            match key {
                b"path" => self.path = Some(value.to_owned()),
                b"linkpath" => self.link = Some(value.to_owned()),
                b"uid" => self.uid = text.parse().ok(),
                b"gid" => self.gid = text.parse().ok(),
                b"size" => self.size = text.parse().ok(),
                // Fractions of a second are dropped.
                b"mtime" => self.mtime = text.split('.').next().and_then(|t| t.parse().ok()),
                b"GNU.sparse.major" | b"GNU.sparse.map" => {
                    return Err(refused(
                        "it holds sparse files, which images must not".into(),
                    ));
                }
                _ => self.xattr(key, value),
            }
        }
        Ok(())
    }

    fn xattr(&mut self, key: &[u8], value: &[u8]) {
        let Some(name) = key.strip_prefix(XATTR_PREFIX) else {
            return;
        };
        // Capabilities of programs and what users note; labels of the builder's host are not ours.
        if name == b"security.capability" || name.starts_with(b"user.") {
            self.xattrs
                .push((OsStr::from_bytes(name).to_owned(), value.to_owned()));
        }
    }

    fn link_of(&self, entry: &Entry<'_, impl Read>) -> Result<Vec<u8>, Error> {
        let named = self.link.clone();
        let link = named.or_else(|| entry.link_name_bytes().map(std::borrow::Cow::into_owned));
        link.filter(|l| !l.is_empty())
            .ok_or_else(|| refused("a link leads nowhere".into()))
    }

    fn attributes(&self, entry: &Entry<'_, impl Read>) -> Result<Attributes, Error> {
        let header = entry.header();
        // Archivers leave fields empty that they do not know; root and the epoch stand in.
        let id = |number: std::io::Result<u64>| number.ok().and_then(|n| u32::try_from(n).ok());
        let mtime = header
            .mtime()
            .ok()
            .and_then(|seconds| i64::try_from(seconds).ok());
        Ok(Attributes {
            mode: header.mode().map_err(read_error)?,
            uid: self.uid.or_else(|| id(header.uid())).unwrap_or(0),
            gid: self.gid.or_else(|| id(header.gid())).unwrap_or(0),
            mtime: self.mtime.or(mtime).unwrap_or(0),
            xattrs: self.xattrs.clone(),
        })
    }
}

/// Notes an entry and the directories above it.
fn remember(own: &mut HashSet<PathBuf>, path: &Path) {
    for path in path.ancestors() {
        if !own.insert(path.to_owned()) {
            return;
        }
    }
}

fn long_name(entry: &mut Entry<'_, impl Read>) -> Result<Vec<u8>, Error> {
    let mut name = limited(entry, LONG_NAME_MAX)?;
    if name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

fn limited(entry: &mut Entry<'_, impl Read>, max: u64) -> Result<Vec<u8>, Error> {
    if entry.size() > max {
        return Err(Error::TooLarge {
            max,
            what: "bytes in one header",
        });
    }
    let mut data = Vec::new();
    entry.read_to_end(&mut data).map_err(read_error)?;
    Ok(data)
}

/// Tells a failure to read the layer from a failure to write the file.
struct Source<'a, R: Read> {
    inner: &'a mut R,
    failed: Option<std::io::Error>,
}

impl<R: Read> Read for Source<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            let kind = error.kind();
            self.failed = Some(error);
            kind.into()
        })
    }
}
