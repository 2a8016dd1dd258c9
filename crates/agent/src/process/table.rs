//! All processes of the agent, and who waits for which to end.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use forkd_wire::agent::connect::Code;
use forkd_wire::agent::process::{ListResponse, ProcessInfo, ProcessSelector};
use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::sync::oneshot;

use super::Process;
use crate::rpc::Fault;

/// Processes started by callers at once.
pub(crate) const MAX_PROCESSES: usize = 1024;

/// The processes.
#[derive(Debug, Default)]
pub(crate) struct Table {
    running: Mutex<BTreeMap<u32, Arc<Process>>>,
    waiting: Mutex<HashMap<u32, oneshot::Sender<WaitStatus>>>,
}

impl Table {
    /// Whether one more may be started.
    pub(crate) fn check_room(&self) -> Result<(), Fault> {
        let running = self
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len();
        if running < MAX_PROCESSES {
            return Ok(());
        }
        Err(Fault::new(
            Code::ResourceExhausted,
            format!("{running} processes run already; end some of them first"),
        ))
    }

    /// Waits for the child `pid`. To be called before the event loop can run again after the child
    /// was started, or its end may be missed.
    pub(crate) fn watch(&self, pid: u32) -> oneshot::Receiver<WaitStatus> {
        let (sender, receiver) = oneshot::channel();
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pid, sender);
        receiver
    }

    pub(crate) fn insert(&self, process: Arc<Process>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.insert(process.pid, process);
    }

    pub(crate) fn remove(&self, process: &Arc<Process>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // The pid may have been given to a new process since.
        if running
            .get(&process.pid)
            .is_some_and(|found| Arc::ptr_eq(found, process))
        {
            running.remove(&process.pid);
        }
    }

    /// Reaps every child that has ended, ours and the orphans that PID 1 inherits.
    pub(crate) fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            let waiting = self
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&pid);
            let Some(sender) = waiting else { continue };
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(process) = running.get(&pid) {
                process.gone.store(true, Ordering::Relaxed);
            }
            let _ = sender.send(status);
        }
    }

    pub(crate) fn find(&self, selector: &ProcessSelector) -> Result<Arc<Process>, Fault> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match selector {
            ProcessSelector::Pid(pid) => running.get(pid),
            ProcessSelector::Tag(tag) => running
                .values()
                .find(|process| process.tag.as_deref() == Some(tag)),
        };
        found.cloned().ok_or_else(|| {
            let named = match selector {
                ProcessSelector::Pid(pid) => format!("pid {pid}"),
                ProcessSelector::Tag(tag) => format!("tag {tag:?}"),
            };
            Fault::new(
                Code::NotFound,
                format!("no process with {named} runs; it may have ended"),
            )
        })
    }

    pub(crate) fn list(&self) -> ListResponse {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let info = |process: &Arc<Process>| ProcessInfo {
            config: process.config.clone(),
            pid: process.pid,
            tag: process.tag.clone(),
        };
        ListResponse {
            processes: running.values().map(info).collect(),
        }
    }

    pub(crate) fn kill_all(&self) {
        for process in self
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            process.kill();
        }
    }
}
