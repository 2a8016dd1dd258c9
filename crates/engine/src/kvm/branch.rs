//! Branches: a running VM is forked into a template that can be forked at once, and that writes its
//! files behind.
//!
//! ```text
//!   VM ──Branch──► runs on, after a pause of a millisecond
//!    └─ template ──Fork──► VMs, at once
//!         └─ writer ──Write──► memory, index, state: only pages that differ from the base
//! ```

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forkd_wire::vmm::{Reply, Request, State};

use super::client;
use super::process::{Monitor, strange};
use super::template::KvmTemplate;
use super::vm::{Inner, ORDER_LIMIT, WRITE_LIMIT};
use super::{NAME, client::Error as Refusal};
use crate::rundir::failed;
use crate::{BranchSpec, Error, LayerFiles, SaveReport, Template, blocking};

/// How often a template is asked whether its writer still lives, which tells its end by itself only
/// when it can.
const WRITER_TICK: Duration = Duration::from_millis(250);

/// How long a writer that has said why it failed may take to end.
const WRITER_END: Duration = Duration::from_secs(5);

/// A template that was just branched off.
pub(super) struct Born {
    pub(super) template: Arc<KvmTemplate>,
    pub(super) pause: Duration,
    pub(super) base: String,
}

/// Saves a VM as a layer: by a branch that nobody forks.
pub(super) async fn save_layer(
    vm: &Inner,
    files: LayerFiles,
    state: PathBuf,
) -> Result<SaveReport, Error> {
    let paths = [files.memory.clone(), files.index.clone(), state.clone()];
    blocking::run(move || refuse_existing(&paths)).await?;
    let born = fork_off(vm).await?;
    let written = write(&born.template, BranchSpec { files, state }).await;
    let closed = born.template.close().await;
    let memory_bytes = written?;
    closed?;
    Ok(SaveReport {
        pause: born.pause,
        memory_bytes,
    })
}

/// Branches a VM.
pub(super) async fn fork_off(vm: &Inner) -> Result<Born, Error> {
    if vm.booted {
        return Err(Error::Unsupported {
            engine: NAME,
            what: "save a machine that was booted, not forked, as a layer",
        });
    }
    let _turn = vm.turn.lock().await;
    let (ours, theirs) = client::pair().map_err(failed("make a socket for", &vm.run_dir))?;
    let request = Request::Branch { stay_paused: false };
    let fds = [theirs.as_fd()];
    let reply = vm
        .monitor
        .ask("branch", &request, &fds, ORDER_LIMIT)
        .await?;
    // Open here, it would hide the template's end.
    drop(theirs);
    match reply {
        Reply::Branched {
            pid,
            pause_us,
            base,
            ..
        } => Ok(Born {
            template: Arc::new(KvmTemplate::born(pid, ours).await?),
            pause: Duration::from_micros(u64::from(pause_us)),
            base,
        }),
        other => Err(strange("branch", &other)),
    }
}

/// Has a branch written. Answers the bytes of memory.
pub(super) async fn write(template: &KvmTemplate, spec: BranchSpec) -> Result<u64, Error> {
    let monitor = template.monitor();
    let BranchSpec { files, state } = spec;
    let (paths, pagemap) = ([files.memory, files.index, state], monitor.pagemap());
    let files = blocking::run(move || Files::create(paths, &pagemap)).await?;
    let written = tokio::select! {
        written = files.fill(monitor, "write the branch", &Request::Write) => written,
        error = writer_lost(monitor) => Err(error),
    };
    let written = match written {
        Ok(bytes) => settled(monitor).await.map(|()| bytes),
        Err(error) => {
            // Until the writer has ended the template would refuse to try again.
            _ = tokio::time::timeout(WRITER_END, settled(monitor)).await;
            Err(error)
        }
    };
    files.finish(written).await
}

/// Answers when the process that writes has ended without a word.
async fn writer_lost(monitor: &Monitor) -> Error {
    loop {
        tokio::time::sleep(WRITER_TICK).await;
        match status(monitor).await {
            Ok((State::Memory, error)) if !error.is_empty() => {
                // Its own word may be on its way, and says more.
                tokio::time::sleep(WRITER_TICK).await;
                return Error::Control {
                    step: "write the branch",
                    detail: error,
                };
            }
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}

/// Waits until the template knows that its files are there.
async fn settled(monitor: &Monitor) -> Result<(), Error> {
    loop {
        match status(monitor).await? {
            (State::Ready, _) => return Ok(()),
            (State::Writing, _) => tokio::time::sleep(Duration::from_millis(1)).await,
            (_, error) => {
                return Err(Error::Control {
                    step: "write the branch",
                    detail: error,
                });
            }
        }
    }
}

async fn status(monitor: &Monitor) -> Result<(State, String), Error> {
    let step = "ask for the status of";
    match monitor
        .ask(step, &Request::Status, &[], ORDER_LIMIT)
        .await?
    {
        Reply::Status {
            state, write_error, ..
        } => Ok((state, write_error)),
        other => Err(strange(step, &other)),
    }
}

/// The files of a save under way: memory, index, state, and the list of pages.
#[derive(Debug)]
pub(super) struct Files {
    paths: [PathBuf; 3],
    fds: Vec<OwnedFd>,
}

impl Files {
    /// Creates the files, none of which may exist. Blocks.
    pub(super) fn create(paths: [PathBuf; 3], pagemap: &Path) -> Result<Files, Error> {
        let pages = File::open(pagemap).map_err(failed("read", pagemap))?;
        let mut files = Files {
            paths,
            fds: Vec::with_capacity(4),
        };
        for at in 0..files.paths.len() {
            let path = &files.paths[at];
            match File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)
            {
                Ok(file) => files.fds.push(file.into()),
                Err(source) => {
                    let error = failed("save to", path)(source);
                    remove(&files.paths[..at]);
                    return Err(error);
                }
            }
        }
        files.fds.push(pages.into());
        Ok(files)
    }

    /// Has them written. Answers the bytes of memory.
    pub(super) async fn fill(
        &self,
        monitor: &Monitor,
        step: &'static str,
        request: &Request,
    ) -> Result<u64, Error> {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        match monitor.client().ask(request, &fds, WRITE_LIMIT).await {
            Ok(Reply::Written { data_bytes, .. }) => Ok(data_bytes),
            Ok(other) => Err(strange(step, &other)),
            Err(Refusal::Refused(failure)) if failure.errno != 0 => {
                let errno = i32::try_from(failure.errno).unwrap_or(0);
                let source = std::io::Error::from_raw_os_error(errno);
                tracing::debug!(failure.message, "files of a snapshot are not written");
                Err(failed("write", &self.paths[0])(source))
            }
            Err(Refusal::Refused(failure)) => Err(super::template::refused(step, failure)),
            Err(Refusal::Late) => Err(Error::Timeout {
                step,
                millis: u64::try_from(WRITE_LIMIT.as_millis()).unwrap_or(u64::MAX),
            }),
            Err(Refusal::Closed) => Err(monitor.process.gone(step).await),
        }
    }

    /// Half a snapshot is none.
    pub(super) async fn finish<T: Send + 'static>(
        self,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        if outcome.is_err() {
            blocking::run(move || {
                drop(self.fds);
                remove(&self.paths);
            })
            .await;
        }
        outcome
    }
}

fn refuse_existing(paths: &[PathBuf]) -> Result<(), Error> {
    match paths.iter().find(|path| path.exists()) {
        Some(path) => Err(failed("save to", path)(
            std::io::ErrorKind::AlreadyExists.into(),
        )),
        None => Ok(()),
    }
}

fn remove(paths: &[PathBuf]) {
    for path in paths {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "file is left over");
        }
    }
}
