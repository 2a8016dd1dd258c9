//! Branches that are in memory and not, or not yet, on disk.
//!
//! ```text
//!   branched ──► Writing ──published──► a snapshot like any other
//!                 ▲ └──── disk full ──► Failed: the reason is told, forks go on, gone with the daemon
//!                 └──── space again ─────┘
//! ```
//!
//! A tag is here or in the store, never in both: the store's draft keeps it from being given twice while
//! it is written, and this table keeps it afterwards where the writing failed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_wire::error::ErrorCode;
use forkd_wire::id::Tag;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::templates::Loaded;
use crate::view::{SnapshotStatus, SnapshotView};
use crate::{Error, limits};

/// How the writing stands.
#[derive(Debug, Clone)]
pub(super) enum Progress {
    /// It goes on.
    Writing,
    /// It is on disk; this is how it looks there.
    Published(Box<SnapshotView>),
    /// It is not on disk; why. It is tried again as long as its template lives.
    Failed(String),
    /// It was given up because somebody removed it.
    Removed,
}

/// A branch in memory.
#[derive(Debug, Clone)]
pub(super) struct Behind {
    pub(super) loaded: Arc<Loaded>,
    /// As it was when it was branched.
    pub(super) view: SnapshotView,
    pub(super) progress: watch::Receiver<Progress>,
    /// Gives the writing up.
    pub(super) cancel: CancellationToken,
}

impl Behind {
    /// How it looks now.
    pub(super) fn view(&self) -> SnapshotView {
        let mut view = self.view.clone();
        match &*self.progress.borrow() {
            Progress::Writing => {}
            Progress::Published(published) => {
                view = SnapshotView::clone(published);
                view.pause = self.view.pause;
            }
            Progress::Failed(why) => {
                view.status = SnapshotStatus::Failed;
                view.problem = Some(why.clone());
            }
            Progress::Removed => view.bootable = false,
        }
        view
    }

    /// Its template, unless that has died.
    pub(super) fn forkable(&self) -> Result<Arc<Loaded>, Error> {
        if self.loaded.template.is_alive() {
            return Ok(Arc::clone(&self.loaded));
        }
        let tag = &self.view.tag;
        Err(Error::new(
            ErrorCode::NotReady,
            format!("snapshot {tag} was in memory only, and its process has ended"),
        )
        .with_remedy(format!(
            "remove it with `forkd rmi {tag}` and branch its sandbox again"
        )))
    }

    /// Ends the writing, if it goes on, and lets go of the template. Answers whether it had come to disk
    /// all the same.
    pub(super) async fn give_up(&self) -> bool {
        self.cancel.cancel();
        let mut progress = self.progress.clone();
        // Closed when the task that writes is over.
        while progress.changed().await.is_ok() {}
        self.loaded.close().await;
        matches!(*progress.borrow(), Progress::Published(_))
    }

    /// Waits until the attempt to write it that is under way is over.
    pub(super) async fn settled(&self) -> Progress {
        let mut progress = self.progress.clone();
        match progress
            .wait_for(|progress| !matches!(progress, Progress::Writing))
            .await
        {
            Ok(progress) => progress.clone(),
            // The task that writes is gone without a word: a panic of it.
            Err(_) => Progress::Failed("the task that wrote it ended".to_owned()),
        }
    }
}

/// The branches in memory, by tag.
#[derive(Debug)]
pub(super) struct Table {
    branches: Mutex<BTreeMap<Tag, Behind>>,
    /// Whoever writes has one: many at once would only fight for the disk.
    pub(super) writers: Semaphore,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            branches: Mutex::default(),
            writers: Semaphore::new(limits::WRITES_BEHIND),
        }
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Tag, Behind>> {
        self.branches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, tag: &Tag) -> Option<Behind> {
        self.lock().get(tag).cloned()
    }

    pub(super) fn insert(&self, behind: Behind) {
        self.lock().insert(behind.view.tag.clone(), behind);
    }

    pub(super) fn remove(&self, tag: &Tag) -> Option<Behind> {
        self.lock().remove(tag)
    }

    pub(super) fn all(&self) -> Vec<Behind> {
        self.lock().values().cloned().collect()
    }

    /// Refuses a tag that is taken here.
    pub(super) fn refuse_taken(&self, tag: &Tag) -> Result<(), Error> {
        match self.get(tag) {
            None => Ok(()),
            Some(_) => Err(Error::new(
                ErrorCode::AlreadyExists,
                format!("snapshot {tag} exists already, in memory"),
            )
            .with_remedy(format!(
                "choose another tag or remove it with `forkd rmi {tag}`"
            ))),
        }
    }

    /// Refuses what needs the files of a snapshot that is in memory only.
    pub(super) fn refuse_unwritten(&self, tag: &Tag) -> Result<(), Error> {
        let Some(behind) = self.get(tag) else {
            return Ok(());
        };
        match &*behind.progress.borrow() {
            Progress::Writing => Err(Error::new(
                ErrorCode::InUse,
                format!("snapshot {tag} is being written"),
            )
            .with_remedy("wait until `forkd images` says that it is ready")),
            Progress::Failed(why) => Err(Error::new(
                ErrorCode::NotReady,
                format!("snapshot {tag} is in memory only: {why}"),
            )
            .with_remedy("free space: it is written once there is some")),
            Progress::Published(_) | Progress::Removed => Ok(()),
        }
    }
}
