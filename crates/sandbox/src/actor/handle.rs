//! The outside of a sandbox's task: what others may see and ask.

use std::sync::{Arc, OnceLock};

use forkd_engine::{Branch, SaveReport, SaveSpec, Vm};
use forkd_slot::policy::Policy;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::view::{Ending, SandboxStatus, SandboxView};
use crate::{Error, guest};

/// Requests that may wait for one sandbox. More is answered with `busy`: whoever sends them faster than a VM
/// can be paused is not helped by a longer queue.
pub(super) const INBOX: usize = 32;

/// What can be asked of a live sandbox.
#[derive(Debug)]
pub(crate) enum Request {
    Pause(oneshot::Sender<Result<(), Error>>),
    Resume(oneshot::Sender<Result<(), Error>>),
    Save(SaveSpec, oneshot::Sender<Result<SaveReport, Error>>),
    Branch(oneshot::Sender<Result<Branch, Error>>),
    Network(Policy, oneshot::Sender<Result<(), Error>>),
}

/// A wish for the end.
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    pub(crate) ending: Ending,
    pub(crate) why: String,
}

/// A cheap handle on a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(super) view: watch::Receiver<SandboxView>,
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) stop: watch::Sender<Option<Stop>>,
    pub(super) vm: Arc<OnceLock<(Arc<dyn Vm>, guest::Client)>>,
}

impl Handle {
    pub(crate) fn view(&self) -> SandboxView {
        self.view.borrow().clone()
    }

    /// Where it is in its life; cheaper than all of [`Handle::view`].
    pub(crate) fn status(&self) -> SandboxStatus {
        self.view.borrow().status
    }

    /// The virtual CPUs of a sandbox that has not ended.
    pub(crate) fn vcpus(&self) -> Option<u32> {
        let view = self.view.borrow();
        (view.status != SandboxStatus::Ended).then_some(view.vcpus)
    }

    /// The VM and its agent, once it was forked.
    pub(crate) fn vm(&self) -> Option<&(Arc<dyn Vm>, guest::Client)> {
        self.vm.get()
    }

    /// Asks for the end; the first reason stays.
    pub(crate) fn stop(&self, ending: Ending, why: &str) {
        self.stop.send_if_modified(|asked| {
            let first = asked.is_none();
            if first {
                let why = why.to_owned();
                *asked = Some(Stop { ending, why });
            }
            first
        });
    }

    /// Waits until nothing of the sandbox is left.
    pub(crate) async fn ended(&self) -> SandboxView {
        self.wait(|view| view.status == SandboxStatus::Ended).await
    }

    /// Waits until the sandbox runs or has ended.
    pub(crate) async fn settled(&self) -> SandboxView {
        self.wait(|v| !matches!(v.status, SandboxStatus::Starting | SandboxStatus::Stopping))
            .await
    }

    async fn wait(&self, until: impl FnMut(&SandboxView) -> bool) -> SandboxView {
        let mut view = self.view.clone();
        match view.wait_for(until).await {
            Ok(view) => view.clone(),
            // The actor publishes its end before it goes, so this is a panic of it.
            Err(_) => self.view(),
        }
    }

    pub(crate) async fn ask<T>(
        &self,
        id: &SandboxId,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .try_send(request(reply))
            .map_err(|e| match e {
                mpsc::error::TrySendError::Full(_) => Error::new(
                    ErrorCode::Busy,
                    format!("sandbox {id} has {INBOX} requests waiting; try again"),
                ),
                mpsc::error::TrySendError::Closed(_) => ended_error(id),
            })?;
        answer.await.map_err(|_| ended_error(id))?
    }
}

fn ended_error(id: &SandboxId) -> Error {
    Error::new(ErrorCode::NotReady, format!("sandbox {id} ended"))
}
