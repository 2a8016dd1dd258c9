//! What a fake guest is made of.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::sync::watch;

use super::process::Processes;
use crate::Exit;

/// The part that is saved and inherited. Cloning shares the files' contents until they are replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Files by absolute path.
    pub(super) files: BTreeMap<String, Content>,
    /// The interpreter's variables.
    pub(super) variables: BTreeMap<String, Value>,
    /// Environment of new processes.
    pub(super) env: BTreeMap<String, String>,
    /// The guest's name.
    pub(super) hostname: String,
}

/// A file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content(pub(super) Arc<Vec<u8>>);

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&*self.0))
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(serde::de::Error::custom)?;
        Ok(Content(Arc::new(bytes)))
    }
}

/// A value of the interpreter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Value {
    /// Nothing.
    None,
    /// A whole number.
    Int(i64),
    /// A text.
    Text(String),
}

/// A running guest.
#[derive(Debug)]
pub(super) struct Guest {
    state: Mutex<State>,
    pub(super) processes: Processes,
    /// Whether it runs; while it does not, nobody gets an answer.
    running: watch::Sender<bool>,
    /// How it ended.
    pub(super) exit: watch::Sender<Option<Exit>>,
}

impl Guest {
    pub(super) fn new(state: State) -> Guest {
        Guest {
            state: Mutex::new(state),
            processes: Processes::default(),
            running: watch::Sender::new(false),
            exit: watch::Sender::new(None),
        }
    }

    /// The state, locked for a moment.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_running(&self, running: bool) {
        self.running.send_replace(running);
    }

    pub(super) fn is_running(&self) -> bool {
        *self.running.borrow()
    }

    /// Ends the guest, unless it has ended already.
    pub(super) fn end(&self, exit: Exit) {
        self.exit.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(exit);
            }
            first
        });
        self.processes.kill_all();
    }

    /// Waits until the guest has ended.
    pub(super) async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(Exit::Unknown),
            Err(_) => Exit::Unknown,
        }
    }

    /// Waits until the guest runs.
    pub(super) async fn runs(&self) {
        let mut running = self.running.subscribe();
        // The sender lives as long as the guest.
        let _ = running.wait_for(|running| *running).await;
    }
}
