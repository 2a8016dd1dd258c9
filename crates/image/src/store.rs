//! Where images are kept.
//!
//! ```text
//! DIR/images/NAME/image.json        which blobs make the image NAME
//! DIR/blobs/KIND-DIGEST/…           kernel, initramfs or rootfs, named by its content
//! DIR/inputs/KIND-DIGEST.json       which blob these inputs gave: the cache
//! DIR/cache/                        downloaded packages
//! DIR/tmp/                          builds that are going on, or were killed
//! DIR/lock                          held by whoever changes any of this
//! ```
//!
//! Readers take no lock: everything appears by rename, complete. An image that another build of
//! the same name displaces stays, as `NAME@DIGEST`, because snapshots name images by digest; it is
//! dropped by [`Store::prune`] when its user says that nothing needs it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::digest::Digest;
use crate::{Error, Progress, name};

mod blob;
pub(crate) mod build;
mod record;
mod sweep;

use record::Record;

/// How often a build that waits for another one looks again.
const LOCK_POLL: Duration = Duration::from_millis(100);
/// Shorter beginnings of a digest are taken for names only.
const PREFIX_MIN: usize = 6;

/// A directory of images.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// What a guest boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What users call it; `NAME@DIGEST` once a newer build has taken its name.
    pub name: String,
    /// Of the bytes of kernel, initramfs and root: two images with one digest are the same.
    pub digest: Digest,
    /// Holds the image's record.
    pub dir: PathBuf,
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The same kernel as an ELF file, for engines that boot nothing else, if it could be had.
    pub vmlinux: Option<PathBuf>,
    /// The first root file system: the agent and kernel modules.
    pub initramfs: PathBuf,
    /// The root file system, a read-only EROFS image.
    pub rootfs: PathBuf,
    /// The kernel's release, as in `uname -r`.
    pub kernel_version: String,
    /// What all its files take, in bytes; images may share some of them.
    pub size_bytes: u64,
    /// When it was built.
    pub created_at: SystemTime,
    /// What the root is made of, for people.
    pub source: String,
}

impl Image {
    /// The directories of the store that this image is made of.
    pub fn blob_paths(&self) -> Vec<&Path> {
        [&self.kernel, &self.initramfs, &self.rootfs]
            .iter()
            .filter_map(|p| p.parent())
            .collect()
    }
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { step, path, source }
}

impl Store {
    /// Opens a store, making it if need be, and clears away what killed builds left.
    pub fn open(dir: &Path) -> Result<Store, Error> {
        for part in ["images", "blobs", "inputs", "cache", "tmp"] {
            let path = dir.join(part);
            fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        // Mounts and processes know the directory by its real path.
        let dir = dir.canonicalize().map_err(io_error("open", dir))?;
        let store = Store { dir };
        let lock = store.lock_file()?;
        if lock.try_lock().is_ok() {
            sweep::leftovers(&store.dir.join("tmp"));
        }
        Ok(store)
    }

    /// The directory of the store.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The image of a name, or the one whose digest begins so (six digits or more).
    pub fn get(&self, name: &str) -> Result<Option<Image>, Error> {
        if record::is_record_name(name) {
            match Record::read(&self.dir, name) {
                Ok(record) => return record.image(&self.dir).map(Some),
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if name.len() < PREFIX_MIN || !name.bytes().all(hex) {
            return Ok(None);
        }
        let mut found = self.list()?;
        found.retain(|image| image.digest.as_str().starts_with(name));
        found.dedup_by(|a, b| a.digest == b.digest);
        match found.len() {
            0 => Ok(None),
            1 => Ok(found.pop()),
            _ => Err(Error::Ambiguous(name.to_owned())),
        }
    }

    /// All usable images, by name. Damaged ones are left out with a warning in the log; asking
    /// for one by name says what is wrong with it.
    pub fn list(&self) -> Result<Vec<Image>, Error> {
        let mut images = Vec::new();
        for name in self.names()? {
            match Record::read(&self.dir, &name).and_then(|record| record.image(&self.dir)) {
                Ok(image) => images.push(image),
                Err(error) => tracing::warn!(name, error = %error, "image left out"),
            }
        }
        Ok(images)
    }

    /// Removes an image and what only it used. Who may still need it is the caller's question:
    /// snapshots name images by digest.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let _lock = self.lock(&mut crate::Silent)?;
        let exact = record::is_record_name(name) && record::path(&self.dir, name).exists();
        let name = match exact {
            true => name.to_owned(),
            false => {
                self.get(name)?
                    .ok_or_else(|| Error::NotFound(name.to_owned()))?
                    .name
            }
        };
        self.drop_record(&name)?;
        self.drop_unused()
    }

    /// Removes displaced images (`NAME@DIGEST`) that nobody needs, and gives their names.
    pub fn prune(&self, needed: &dyn Fn(&Image) -> bool) -> Result<Vec<String>, Error> {
        let _lock = self.lock(&mut crate::Silent)?;
        let mut gone = Vec::new();
        for image in self.list()? {
            if name::image(&image.name).is_err() && !needed(&image) {
                self.drop_record(&image.name)?;
                gone.push(image.name);
            }
        }
        self.drop_unused()?;
        Ok(gone)
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        let dir = self.dir.join("images");
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io_error("list", &dir))? {
            let entry = entry.map_err(io_error("list", &dir))?;
            let name = entry.file_name().into_string().unwrap_or_default();
            if record::is_record_name(&name) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn drop_record(&self, name: &str) -> Result<(), Error> {
        // Moved away first: readers see the whole image or none.
        let scratch = sweep::Scratch::new(&self.dir.join("tmp"))?;
        let from = self.dir.join("images").join(name);
        fs::rename(&from, scratch.path().join("removed")).map_err(io_error("remove", &from))?;
        sweep::sync_dir(&self.dir.join("images"))
    }

    /// Drops blobs that no image uses, and what the cache says about them.
    fn drop_unused(&self) -> Result<(), Error> {
        let mut used = BTreeSet::new();
        for name in self.names()? {
            match Record::read(&self.dir, &name) {
                Ok(record) => used.extend(record.blob_names()),
                // Unknown what it uses: keep everything until it is gone.
                Err(error) => {
                    tracing::warn!(name, error = %error, "unused blobs are kept");
                    return Ok(());
                }
            }
        }
        blob::drop_unused(&self.dir, &used)
    }

    fn lock_file(&self) -> Result<File, Error> {
        let path = self.dir.join("lock");
        let mut options = File::options();
        options.create(true).truncate(false).write(true);
        options.open(&path).map_err(io_error("open", &path))
    }

    /// Waits until nobody else changes the store. The lock ends with the file, and so with us.
    fn lock(&self, progress: &mut dyn Progress) -> Result<File, Error> {
        let file = self.lock_file()?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(fs::TryLockError::WouldBlock) => {}
                Err(fs::TryLockError::Error(source)) => {
                    return Err(io_error("lock", &self.dir)(source));
                }
            }
            if !told {
                progress.message("waiting for another build in this store to end");
                told = true;
            }
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            std::thread::sleep(LOCK_POLL);
        }
    }
}

#[cfg(test)]
mod tests;
