//! A QEMU process: asked, watched until it is gone.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use forkd_host::process::{self as host, Process};
use serde_json::Value;
use tokio::net::UnixStream;

use super::client::{self, Client, Seen};
use super::request::{Command, Shutdown, Status, parse_set, parse_status};
use crate::child::Watched;
use crate::output::Output;
use crate::{Error, Exit};

/// How long a loaded VM may take to run, on a host with far more VMs than cores.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// A QEMU process that somebody holds on to.
#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) process: Watched,
    client: Client,
}

impl Monitor {
    /// Takes a process and a connection to its control socket.
    pub(super) fn attach(
        process: Process,
        control: UnixStream,
        output: Arc<Output>,
    ) -> Result<Monitor, Error> {
        let client = Client::new(control);
        let seen = client.seen();
        let process = Watched::attach(process, output, seen, |seen| seen.closed, meaning)?;
        Ok(Monitor { process, client })
    }

    /// Runs a command. A process that is gone is told with its last words.
    pub(super) async fn command(&self, command: Command) -> Result<Value, Error> {
        self.command_with(command, None).await
    }

    /// Has CPU and device state written into a file. The vCPUs stand still.
    pub(super) async fn save_devices(&self, file: File) -> Result<(), Error> {
        let taken = self.command_with(Command::TakeFile, Some(&file)).await?;
        let set = parse_set(&taken).ok_or_else(|| Error::Control {
            step: Command::TakeFile.step(),
            detail: format!("not understood: {taken}"),
        })?;
        let saved = self.command(Command::SaveDevices(set)).await;
        let dropped = self.command(Command::DropFile(set)).await;
        saved.and(dropped).map(|_| ())
    }

    async fn command_with(&self, command: Command, file: Option<&File>) -> Result<Value, Error> {
        let step = command.step();
        match self.client.command(&command, file).await {
            Ok(value) => Ok(value),
            Err(client::Error::Refused(detail)) => Err(Error::Control { step, detail }),
            Err(client::Error::Late) => Err(Error::Timeout {
                step,
                millis: command.deadline().as_millis() as u64,
            }),
            Err(client::Error::Closed) => Err(self.process.gone(step).await),
        }
    }

    /// Whether the guest runs.
    pub(super) async fn status(&self) -> Result<Status, Error> {
        let value = self.command(Command::Status).await?;
        parse_status(&value).ok_or_else(|| Error::Control {
            step: Command::Status.step(),
            detail: format!("not understood: {value}"),
        })
    }

    /// Waits until a VM whose state is being loaded runs.
    pub(super) async fn loaded(&self) -> Result<(), Error> {
        let mut seen = self.client.seen();
        if self.status().await? == Status::Loading {
            // Asked after events flow, so that the one waited for cannot have been missed.
            let settled = async {
                let settled = seen.wait_for(|seen| seen.running == Some(true) || seen.closed);
                settled.await.is_ok_and(|seen| !seen.closed)
            };
            let step = "load the snapshot's state";
            match tokio::time::timeout(LOAD_LIMIT, settled).await {
                Ok(true) => {}
                Ok(false) => return Err(self.process.gone(step).await),
                Err(_) => {
                    let millis = LOAD_LIMIT.as_millis() as u64;
                    return Err(Error::Timeout { step, millis });
                }
            }
        }
        Ok(())
    }
}

/// How a process ended as far as the guest is concerned.
fn meaning(exit: Option<host::Exit>, seen: &Seen) -> Exit {
    match (exit, seen.shutdown) {
        (Some(host::Exit::Signal(signal)), _) => Exit::Signal(signal),
        (Some(host::Exit::Code(code)), _) if code != 0 => Exit::Code(code),
        (_, Some(Shutdown::Reset)) => Exit::Reset,
        (Some(host::Exit::Code(_)), _) | (_, Some(Shutdown::PowerOff)) => Exit::Code(0),
        _ => Exit::Unknown,
    }
}
