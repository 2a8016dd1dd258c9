//! Making one full snapshot of a chain of layers: it forks the same, and needs nothing below it.

use std::fs::{File, OpenOptions};
use std::path::Path;

use forkd_host::sparse;
use forkd_wire::id::Tag;

use crate::check::{open, read_index};
use crate::draft::{ManifestDraft, MemoryDraft};
use crate::error::Error;
use crate::store::{Layer, Snapshot, Store};

impl Store {
    /// Publishes a copy of a snapshot with all of RAM in one file, under another tag.
    pub fn flatten(&self, tag: &Tag, to: &Tag) -> Result<Snapshot, Error> {
        let pin = self.pin(tag)?;
        let files = pin.files();
        let draft = self.begin(to)?;
        let memory = copy(tag, &files.memory, &draft.memory_path())?;
        for layer in &files.layers {
            apply(tag, &memory, &draft.memory_path(), layer)?;
        }
        copy(tag, &files.state, &draft.state_path())?;
        let manifest = pin.snapshot().manifest.clone();
        draft.publish(ManifestDraft {
            engine: manifest.engine,
            machine: manifest.machine,
            image: manifest.image,
            memory: MemoryDraft::Full,
            lineage: manifest.lineage,
            compatibility: manifest.compatibility,
            warm: manifest.warm,
            labels: manifest.labels,
        })
    }
}

fn copy(tag: &Tag, from: &Path, to: &Path) -> Result<File, Error> {
    let source = open(from).map_err(Error::damaged(tag))?;
    let mut options = OpenOptions::new();
    let created = options.read(true).write(true).create_new(true).open(to);
    let target = created.map_err(|source| {
        let (step, path) = ("create", to.to_owned());
        Error::file(forkd_host::file::Error::Io { step, path, source })
    })?;
    sparse::copy(&source, &target).map_err(Error::content(to))?;
    Ok(target)
}

fn apply(tag: &Tag, memory: &File, path: &Path, layer: &Layer) -> Result<(), Error> {
    let size = sparse::size(memory).map_err(Error::content(path))?;
    let index = read_index(&layer.index, size).map_err(Error::damaged(tag))?;
    let pages = open(&layer.memory).map_err(Error::damaged(tag))?;
    sparse::apply_layer(memory, &pages, &index).map_err(Error::content(path))
}
