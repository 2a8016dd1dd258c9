//! What the last quickstart made, so that the next one can tell whether it still fits.
//!
//! The snapshot's own id binds the note to it: a snapshot that somebody else made under the same tag
//! has another id and is not taken for ours.

use std::path::{Path, PathBuf};

use forkd_wire::api::snapshot::SnapshotInfo;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Longest note that is read.
const NOTE_MAX: u64 = 64 * 1024;

/// Where the note is.
#[derive(Debug, Clone)]
pub(super) struct Memo {
    path: PathBuf,
}

/// How long the stages of making the snapshot took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Stages {
    pub(super) boot_ms: f64,
    pub(super) warm_ms: f64,
    pub(super) snapshot_ms: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Note {
    snapshot_id: String,
    image_digest: String,
    warm: String,
    stages: Stages,
}

impl Memo {
    /// The note of a data directory.
    pub(super) fn at(data: &Path) -> Self {
        Self {
            path: data.join("quickstart.json"),
        }
    }

    /// The stages of a snapshot, if it was made by an earlier run from the same inputs.
    pub(super) fn read(&self, id: &str, digest: &str, warm: &str) -> Option<Stages> {
        let small = std::fs::metadata(&self.path).is_ok_and(|meta| meta.len() <= NOTE_MAX);
        let text = small.then(|| std::fs::read(&self.path).ok()).flatten()?;
        // A damaged note costs a new snapshot, nothing else.
        let note: Note = serde_json::from_slice(&text).ok()?;
        let same = note.snapshot_id == id && note.image_digest == digest && note.warm == warm;
        (same && !id.is_empty()).then_some(note.stages)
    }

    /// Notes what was made.
    pub(super) fn write(
        &self,
        made: &SnapshotInfo,
        digest: &str,
        warm: &str,
    ) -> Result<Stages, Failure> {
        let stages = made.stages.map_or(
            Stages {
                boot_ms: 0.0,
                warm_ms: 0.0,
                snapshot_ms: 0.0,
            },
            |stages| Stages {
                boot_ms: stages.boot_ms,
                warm_ms: stages.warm_ms,
                snapshot_ms: stages.save_ms,
            },
        );
        let note = Note {
            snapshot_id: made.id.clone(),
            image_digest: digest.to_owned(),
            warm: warm.to_owned(),
            stages,
        };
        let written = serde_json::to_vec_pretty(&note)
            .map_err(std::io::Error::other)
            .and_then(|text| {
                let partial = self
                    .path
                    .with_extension(format!("{}.tmp", std::process::id()));
                std::fs::write(&partial, text)?;
                std::fs::rename(&partial, &self.path)
            });
        written.map_err(|error| {
            Failure::caused(format!("cannot write {}", self.path.display()), &error)
        })?;
        Ok(stages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str) -> SnapshotInfo {
        serde_json::from_value(serde_json::json!({
            "tag": "quickstart", "dir": "/x", "created_at_unix": 1, "status": "ready",
            "bootable": true, "id": id,
            "stages": {"boot_ms": 1.0, "warm_ms": 2.0, "save_ms": 3.0},
        }))
        .unwrap()
    }

    #[test]
    fn only_the_same_snapshot_is_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let memo = Memo::at(dir.path());
        assert_eq!(memo.read("a", "d", "w"), None);
        let stages = memo.write(&snapshot("a"), "d", "w").unwrap();
        assert_eq!(stages.snapshot_ms, 3.0);
        assert_eq!(memo.read("a", "d", "w"), Some(stages));
        for (id, digest, warm) in [("b", "d", "w"), ("a", "e", "w"), ("a", "d", "x")] {
            assert_eq!(memo.read(id, digest, warm), None);
        }
        std::fs::write(dir.path().join("quickstart.json"), "{").unwrap();
        assert_eq!(memo.read("a", "d", "w"), None);
    }
}
