//! `manifest.json`: what a snapshot is. Written once; read by every later version of this program.
//!
//! The schema version says how to read it. Within a version the schema only grows: new fields have
//! defaults, and fields that this program does not know are kept.

use std::collections::BTreeMap;
use std::path::PathBuf;

use forkd_wire::id::{SandboxId, Tag};
use serde::{Deserialize, Serialize};

use crate::id::SnapshotId;

/// The version of the schema that this code writes, and the only one it reads.
pub const SCHEMA_VERSION: u32 = 1;
/// The most bytes of a manifest; a reader stops there.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 1024 * 1024;

/// The manifest's file.
pub(crate) const MANIFEST: &str = "manifest.json";
/// The file of RAM.
pub(crate) const MEMORY: &str = "memory.bin";
/// The index of a layer's RAM.
pub(crate) const INDEX: &str = "memory.idx";
/// The file of device and CPU state.
pub(crate) const STATE: &str = "state.bin";

/// A snapshot by name and identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRef {
    /// Its tag when the reference was made.
    pub tag: Tag,
    /// Its id.
    pub id: SnapshotId,
}

/// What a snapshot is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// The snapshot's identity.
    pub id: SnapshotId,
    /// The snapshot's name.
    pub tag: Tag,
    /// When it was published, milliseconds since the Unix epoch.
    pub created_at_ms: u64,
    /// Which engine wrote it, and alone can read its state.
    pub engine: String,
    /// The machine that was frozen.
    pub machine: Machine,
    /// What the machine had booted.
    pub image: Image,
    /// Where it came from.
    #[serde(default)]
    pub lineage: Lineage,
    /// Whether it holds all of RAM.
    pub memory: Memory,
    /// Its files.
    pub files: Vec<FileEntry>,
    /// Facts about the host that its engine compares before using it.
    #[serde(default)]
    pub compatibility: BTreeMap<String, String>,
    /// What was done to warm the machine up, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// Whatever its maker wants to find again.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

/// The machine a guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// What was appended to the engine's kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Whether the guest has a network device.
    #[serde(default)]
    pub network: bool,
}

/// What a machine booted. The root disk is still needed by every fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The image's name when it was used.
    pub name: String,
    /// The image's digest: its identity.
    pub digest: String,
    /// Linux kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: PathBuf,
    /// Read-only root disk.
    pub rootfs: PathBuf,
}

/// Where a snapshot came from. For people and for graphs: nothing needs these to exist still.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The snapshot that the frozen sandbox was forked from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotRef>,
    /// The sandbox that was frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxId>,
}

/// How a snapshot holds RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "snake_case")]
pub enum Memory {
    /// All of it.
    Full,
    /// Only what differs from another snapshot, which must stay.
    Layer {
        /// The snapshot below.
        over: SnapshotRef,
    },
}

impl Memory {
    /// The snapshot below, for a layer.
    pub fn over(&self) -> Option<&SnapshotRef> {
        match self {
            Memory::Full => None,
            Memory::Layer { over } => Some(over),
        }
    }
}

/// One file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the snapshot's directory.
    pub name: String,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// Its [`content_hash`](crate::content_hash).
    pub blake3: String,
}

/// Why bytes are no manifest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    /// No JSON, or not of this shape.
    #[error("not a manifest")]
    Syntax(#[from] serde_json::Error),
    /// Another version.
    #[error("schema version {found}")]
    Version { found: u64 },
}

impl Manifest {
    /// The manifest as pretty JSON with a final newline.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads a manifest. The version is looked at first, for another one may have any other shape.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Manifest, DecodeError> {
        #[derive(Deserialize)]
        struct Versioned {
            schema_version: u64,
        }
        let Versioned { schema_version } = serde_json::from_slice(bytes)?;
        if schema_version != u64::from(SCHEMA_VERSION) {
            return Err(DecodeError::Version {
                found: schema_version,
            });
        }
        Ok(serde_json::from_slice(bytes)?)
    }

    /// A reference to this snapshot.
    pub fn reference(&self) -> SnapshotRef {
        SnapshotRef {
            tag: self.tag.clone(),
            id: self.id.clone(),
        }
    }

    /// The size and hash recorded for a file.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }
}

#[cfg(test)]
mod tests;
