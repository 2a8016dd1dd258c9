//! Making a snapshot: boot an image, warm it, freeze it, publish it.
//!
//! A line of phases with one exit. Whatever happens, the VM is killed and its files are removed; the draft of
//! the snapshot disappears unless it was published.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_engine::{BootSpec, Engine, MachineSpec, SaveMemory, SaveSpec, Vm};
use forkd_snapshot::{Draft, Image, Lineage, Machine, ManifestDraft, MemoryDraft};
use forkd_wire::agent::{EvalRequest, GuestNetwork, ResumeRequest};
use forkd_wire::error::ErrorCode;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::{Node, blocking, cancelled_error, templates};
use forkd_host::chain;

use crate::actor::wall_clock_ns;
use crate::admission::Promise;
use crate::place::{Place, Wish};
use crate::spec::{SnapshotRequest, Warm};
use crate::view::{SnapshotOutcome, SnapshotStages, SnapshotStep};
use crate::{Error, console, crash, guest, ids, limits};

type Steps = Option<mpsc::UnboundedSender<SnapshotStep>>;

impl Node {
    /// Boots an image, warms it, freezes it. Steps are told on `steps` as they begin.
    pub async fn create_snapshot(
        &self,
        request: SnapshotRequest,
        steps: Steps,
    ) -> Result<SnapshotOutcome, Error> {
        request.validate()?;
        self.guarded(|node, cancelled| async move { node.build(request, steps, cancelled).await })
            .await
    }

    async fn build(
        &self,
        request: SnapshotRequest,
        steps: Steps,
        cancelled: CancellationToken,
    ) -> Result<SnapshotOutcome, Error> {
        let (draft, _room) = self.begin_draft(&request).await?;
        crash::point("snapshot: draft begun");
        let id = format!("parent-{}", draft.id());
        let run_dir = self.inner.config.run_dir.join(&id);
        let places = &self.inner.context.places;
        let place = places.take(&id, self.wish()).await?;
        let boot = Boot {
            request: &request,
            draft: &draft,
            id,
            run_dir: run_dir.clone(),
            place: &place,
        };
        let work = self.boot_and_freeze(boot, &steps);
        let frozen = tokio::select! {
            frozen = work => frozen,
            () = cancelled.cancelled() => Err(cancelled_error()),
        };
        self.clear_parent(&run_dir).await;
        places.give_back(&place).await;
        crash::point("snapshot: parent gone");
        let mut stages = frozen?;
        tell(&steps, SnapshotStep::Publishing);
        let publishing = Instant::now();
        let manifest = self.manifest(&request, &stages).await?;
        let snapshot = blocking(move || draft.publish(manifest)).await??;
        crash::point("snapshot: published");
        stages.save += publishing.elapsed();
        Ok(SnapshotOutcome {
            snapshot: super::images::view(&snapshot),
            stages,
        })
    }

    async fn begin_draft(&self, request: &SnapshotRequest) -> Result<(Draft, Promise), Error> {
        self.inner.templates.behind.refuse_taken(&request.tag)?;
        let (store, tag) = (self.inner.store.clone(), request.tag.clone());
        let bytes = request.memory_mib * 1024 * 1024 + self.inner.admission.disk_reserve_bytes();
        let draft = blocking(move || {
            let draft = store.begin(&tag)?;
            store.require_free(bytes)?;
            Ok::<_, forkd_snapshot::Error>(draft)
        })
        .await??;
        let what = format!("the parent of snapshot {}", request.tag);
        let room = self.inner.admission.memory(what, request.memory_mib)?;
        Ok((draft, room))
    }

    /// What the parent wants of the host.
    fn wish(&self) -> Wish {
        Wish {
            device: self.inner.engine.capabilities().network,
            ..Wish::default()
        }
    }

    async fn boot_and_freeze(
        &self,
        boot: Boot<'_>,
        steps: &Steps,
    ) -> Result<SnapshotStages, Error> {
        tell(steps, SnapshotStep::Booting);
        templates::make_dir(&boot.run_dir).await?;
        let started = Instant::now();
        let (request, draft, network) = (boot.request, boot.draft, boot.place.guest_network());
        let spec = boot.spec(self.inner.engine.as_ref())?;
        let vm = self.inner.engine.boot(spec).await?;
        let parent = Parent {
            client: guest::Client::new(Arc::clone(&vm)),
            vm,
            network,
        };
        let outcome = self
            .warm_and_save(&parent, request, draft, started, steps)
            .await;
        if let Err(e) = tokio::time::timeout(limits::KILL_TIMEOUT, parent.vm.kill()).await {
            error!(error = %e, "the parent VM may have leaked");
        }
        outcome
    }

    async fn warm_and_save(
        &self,
        parent: &Parent,
        request: &SnapshotRequest,
        draft: &Draft,
        started: Instant,
        steps: &Steps,
    ) -> Result<SnapshotStages, Error> {
        parent.answers(request.boot_timeout).await?;
        parent.connect().await?;
        crash::point("snapshot: parent booted");
        let boot = started.elapsed();
        tell(steps, SnapshotStep::Warming);
        let warming = Instant::now();
        parent.warm(request).await?;
        crash::point("snapshot: parent warm");
        let warm = warming.elapsed();
        tell(steps, SnapshotStep::Saving);
        let saving = Instant::now();
        parent.client.disconnect().await;
        let spec = SaveSpec {
            memory: SaveMemory::Full(draft.memory_path()),
            state: draft.state_path(),
        };
        let saved = tokio::time::timeout(limits::SAVE_TIMEOUT, parent.vm.save(spec)).await;
        saved.map_err(|_| too_long("saving the parent", limits::SAVE_TIMEOUT))??;
        crash::point("snapshot: parent saved");
        Ok(SnapshotStages {
            boot,
            warm,
            save: saving.elapsed(),
        })
    }

    /// Also reached when the work was cancelled between the start of the VM and its handle: whatever process still
    /// uses the directory is killed.
    async fn clear_parent(&self, run_dir: &std::path::Path) {
        let dir = run_dir.to_owned();
        let swept = blocking(move || super::recover::clear_dir(&dir)).await;
        if let Ok(Err(problem)) | Err(problem) = swept {
            error!(error = problem.chain(), "the parent VM may have leaked");
        }
    }

    async fn manifest(
        &self,
        request: &SnapshotRequest,
        stages: &SnapshotStages,
    ) -> Result<ManifestDraft, Error> {
        let mut labels = request.labels.clone();
        for (name, stage) in [
            ("boot_ms", stages.boot),
            ("warm_ms", stages.warm),
            ("save_ms", stages.save),
        ] {
            labels.insert(name.to_owned(), stage.as_millis().to_string());
        }
        let image = &request.image;
        Ok(ManifestDraft {
            engine: self.engine().to_owned(),
            machine: Machine {
                vcpus: request.vcpus,
                memory_mib: request.memory_mib,
                cmdline: String::new(),
                network: self.inner.engine.capabilities().network,
            },
            image: Image {
                name: image.name.clone(),
                digest: image.digest.clone(),
                kernel: image.kernel.clone(),
                initramfs: image.initramfs.clone(),
                rootfs: image.rootfs.clone(),
            },
            memory: MemoryDraft::Full,
            lineage: Lineage::default(),
            compatibility: self.inner.engine.compatibility().await?,
            warm: match &request.warm {
                Warm::Nothing => None,
                Warm::Python(code) => Some(code.clone()),
                Warm::Command(command) => Some(command.clone()),
            },
            labels,
        })
    }
}

/// A booted VM that is to become a snapshot.
struct Parent {
    vm: Arc<dyn Vm>,
    client: guest::Client,
    network: Option<GuestNetwork>,
}

impl Parent {
    /// Waits for the agent's first answer, or for the VM's end.
    async fn answers(&self, timeout: Duration) -> Result<(), Error> {
        let answered = tokio::select! {
            biased;
            exit = self.vm.exited() => Err(Error::new(
                ErrorCode::GuestUnreachable,
                format!("the VM ended before its guest had booted ({exit:?})"),
            )),
            health = self.client.health(timeout) => health.map(|_| ()).map_err(|e| {
                Error::new(
                    ErrorCode::GuestUnreachable,
                    format!("the guest did not answer within {} s: {}", timeout.as_secs(), chain(&e)),
                )
            }),
        };
        answered.map_err(|e| self.with_console(&e))
    }

    /// Gives the guest its network, so that a warm-up may fetch what it needs. Each fork is given its own later.
    async fn connect(&self) -> Result<(), Error> {
        let Some(network) = self.network.clone() else {
            return Ok(());
        };
        let request = ResumeRequest {
            sandbox_id: "parent".to_owned(),
            index: 0,
            entropy: ids::entropy()?,
            wall_clock_ns: wall_clock_ns(),
            hostname: "parent".to_owned(),
            machine_id: ids::machine_id()?,
            env: BTreeMap::new(),
            network: Some(network),
        };
        let connected = self.client.resume(&request, limits::READY_TIMEOUT).await;
        connected
            .map(drop)
            .map_err(|e| self.with_console(&e.into()))
    }

    async fn warm(&self, request: &SnapshotRequest) -> Result<(), Error> {
        tokio::select! {
            biased;
            exit = self.vm.exited() => Err(self.with_console(&Error::new(
                ErrorCode::GuestUnreachable,
                format!("the VM ended during the warm-up ({exit:?})"),
            ))),
            warmed = self.warm_up(&request.warm, request.warm_timeout) => warmed,
        }
    }

    async fn warm_up(&self, warm: &Warm, timeout: Duration) -> Result<(), Error> {
        match warm {
            Warm::Nothing => self.start_interpreter(timeout).await,
            Warm::Python(code) => self.eval(code, timeout).await,
            Warm::Command(command) => {
                self.run(command, timeout).await?;
                self.start_interpreter(timeout).await
            }
        }
    }

    /// Forks inherit a running interpreter, where the guest has one.
    async fn start_interpreter(&self, timeout: Duration) -> Result<(), Error> {
        match self.client.eval(eval_request(""), timeout).await {
            Err(e) if !e.is_missing_interpreter() => Err(e.into()),
            _ => Ok(()),
        }
    }

    async fn eval(&self, code: &str, timeout: Duration) -> Result<(), Error> {
        let answer = self
            .client
            .eval(eval_request(code), timeout)
            .await
            .map_err(Error::from)?;
        match answer.error {
            None => Ok(()),
            Some(error) => Err(Error::new(
                ErrorCode::InvalidArgument,
                format!("the warm-up code failed: {error}"),
            )
            .with_remedy("try it first with `forkd eval` in a fork of a snapshot without warm-up")),
        }
    }

    async fn run(&self, command: &str, timeout: Duration) -> Result<(), Error> {
        let shell = guest::ExecRequest::shell(command);
        let output = self.client.run(shell, timeout).await.map_err(|e| {
            Error::new(
                e.code(),
                format!("the warm-up command failed: {}", chain(&e)),
            )
        })?;
        if output.exit_code == 0 {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().last().unwrap_or_default();
        let text = format!(
            "the warm-up command ended with status {}: {last}",
            output.exit_code
        );
        Err(Error::new(ErrorCode::InvalidArgument, text))
    }

    fn with_console(&self, error: &Error) -> Error {
        let text = console::with_tail(error.to_string(), &self.vm.console());
        Error::new(error.code(), text).with_remedy(
            "the image's kernel, initramfs or root may be unusable, or --memory too small for them",
        )
    }
}

fn eval_request(code: &str) -> EvalRequest {
    EvalRequest {
        language: "python".to_owned(),
        code: code.to_owned(),
        timeout_ms: 0,
    }
}

/// A parent that is about to be booted.
struct Boot<'a> {
    request: &'a SnapshotRequest,
    draft: &'a Draft,
    id: String,
    run_dir: PathBuf,
    place: &'a Place,
}

impl Boot<'_> {
    fn spec(self, engine: &dyn Engine) -> Result<BootSpec, Error> {
        let image = &self.request.image;
        Ok(BootSpec {
            id: self.id,
            run_dir: self.run_dir,
            machine: MachineSpec {
                vcpus: self.request.vcpus,
                memory_mib: self.request.memory_mib,
                kernel: image.kernel.clone(),
                initramfs: image.initramfs.clone(),
                rootfs: image.rootfs.clone(),
                cmdline: String::new(),
                network: engine.capabilities().network,
            },
            memory_file: self.draft.memory_path().with_extension("booting"),
            // Nobody else could finish it.
            lifetime: forkd_engine::Lifetime::DieWithParent,
            slot: Some(self.place.handles(engine.opens_taps())?),
        })
    }
}

fn too_long(what: &str, limit: Duration) -> Error {
    Error::new(
        ErrorCode::Timeout,
        format!("{what} took longer than {} s", limit.as_secs()),
    )
}

fn tell(steps: &Steps, step: SnapshotStep) {
    if let Some(steps) = steps {
        // A listener that went away does not stop the work.
        let _ = steps.send(step);
    }
}
