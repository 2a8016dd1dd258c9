//! The record of workspaces: one small file, published whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use forkd_host::file;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::{SandboxId, Tag};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::ApiError;
use crate::http::error::chain;

/// The format this code writes and the only one it reads.
const VERSION: u32 = 1;
/// Largest file, bytes: tens of thousands of workspaces.
const FILE_LEN_MAX: u64 = 32 << 20;

/// A workspace on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) name: Tag,
    pub(super) source: Tag,
    pub(super) memory_limit_mib: Option<u64>,
    /// The snapshot of its last suspend.
    pub(super) state: Option<Tag>,
    /// Whether it was put to sleep on request, and not woken since.
    pub(super) suspended: bool,
    /// How often it was suspended; makes the names of its states distinct.
    pub(super) suspends: u64,
    pub(super) sandbox: Option<SandboxId>,
    /// Whether its removal has begun, and must be finished.
    #[serde(default)]
    pub(super) removing: bool,
    pub(super) created_at_unix: u64,
    pub(super) last_active_unix: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Document {
    version: u32,
    workspaces: BTreeMap<Tag, Record>,
}

#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// What the file holds, once it was read. Held while it is written: writes are in order.
    records: Mutex<Option<BTreeMap<Tag, Record>>>,
}

impl Store {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            records: Mutex::new(None),
        }
    }

    pub(super) async fn all(&self) -> Result<Vec<Record>, ApiError> {
        self.with(|records| (false, records.values().cloned().collect()))
            .await
    }

    pub(super) async fn find(&self, name: &Tag) -> Result<Option<Record>, ApiError> {
        self.with(|records| (false, records.get(name).cloned()))
            .await
    }

    pub(super) async fn put(&self, record: Record) -> Result<(), ApiError> {
        self.with(|records| {
            records.insert(record.name.clone(), record);
            (true, ())
        })
        .await
    }

    pub(super) async fn remove(&self, name: &Tag) -> Result<(), ApiError> {
        self.with(|records| (records.remove(name).is_some(), ()))
            .await
    }

    /// Looks at the records or changes a copy of them, which counts once it is on disk.
    async fn with<T>(
        &self,
        work: impl FnOnce(&mut BTreeMap<Tag, Record>) -> (bool, T),
    ) -> Result<T, ApiError> {
        let mut held = self.records.lock().await;
        let mut records = match held.as_ref() {
            Some(records) => records.clone(),
            None => self.blocking(read).await?,
        };
        let (changed, answer) = work(&mut records);
        if changed {
            let document = Document {
                version: VERSION,
                workspaces: records.clone(),
            };
            self.blocking(move |path| write(path, &document)).await?;
        }
        *held = Some(records);
        Ok(answer)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let path = self.path.clone();
        let done = tokio::task::spawn_blocking(move || work(&path)).await;
        done.unwrap_or_else(|failure| {
            Err(ApiError::new(
                ErrorCode::Internal,
                format!("a record was not handled: {failure}"),
            ))
        })
    }
}

fn read(path: &Path) -> Result<BTreeMap<Tag, Record>, ApiError> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let bytes = file::read_bounded(path, FILE_LEN_MAX)
        .map_err(|error| ApiError::new(ErrorCode::Internal, chain(&error)))?;
    let damaged = |why: String| {
        let text = format!(
            "the record of workspaces {} is damaged: {why}",
            path.display()
        );
        ApiError::new(ErrorCode::Corrupt, text).remedy("restore it from a backup, or move it away")
    };
    let document: Document =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if document.version != VERSION {
        let text = format!(
            "the record of workspaces {} has version {}, this program knows {VERSION}",
            path.display(),
            document.version
        );
        return Err(ApiError::new(ErrorCode::Incompatible, text).remedy("use the newer program"));
    }
    Ok(document.workspaces)
}

fn write(path: &Path, document: &Document) -> Result<(), ApiError> {
    let failed = |why: String| ApiError::new(ErrorCode::Internal, why);
    let bytes = serde_json::to_vec_pretty(document).map_err(|error| failed(error.to_string()))?;
    file::publish(path, &bytes).map_err(|error| failed(chain(&error)))
}

#[cfg(test)]
mod tests;
