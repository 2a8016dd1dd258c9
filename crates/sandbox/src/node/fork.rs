//! Forking: records first, then VMs, then every agent told who it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_engine::{ForkSpec, Template, Vm};
use forkd_host::file;
use forkd_slot::policy::Mode;
use forkd_snapshot::Manifest;
use forkd_wire::agent::ResumeRequest;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use futures_util::StreamExt;
use futures_util::future::join_all;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::templates::Loaded;
use super::{Node, blocking, cancelled_error, now_unix};
use crate::actor::{self, Fork, Handle};
use crate::machine::State;
use crate::place::{Place, PlaceLimits, PlaceRecord, Wish};
use crate::record::SandboxRecord;
use crate::spec::{ForkRequest, NodeConfig};
use crate::view::{Ending, ForkOutcome, SandboxStatus, SandboxView};
use crate::{Error, crash, ids, limits};
use forkd_host::chain;

type VmSender = oneshot::Sender<Result<Arc<dyn Vm>, String>>;

impl Node {
    /// Forks; answers when every fork's agent has answered, or failed. A caller that goes away undoes it.
    pub async fn fork(&self, request: ForkRequest) -> Result<ForkOutcome, Error> {
        request.validate()?;
        self.guarded(|node, cancelled| async move { node.fan_out(request, cancelled).await })
            .await
    }

    async fn fan_out(
        &self,
        request: ForkRequest,
        cancelled: CancellationToken,
    ) -> Result<ForkOutcome, Error> {
        let requested = Instant::now();
        let inner = &self.inner;
        let mut room = inner.admission.sandboxes(
            format!("{} forks of {}", request.n, request.tag),
            request.n,
            private_mib(inner.engine.name()),
            || self.load(),
        )?;
        let loaded = inner
            .templates
            .get(
                &request.tag,
                &inner.store,
                &inner.engine,
                inner.config.lifetime,
            )
            .await?;
        let template_ready = requested.elapsed();
        let machine = &loaded.manifest.machine;
        room.vcpus(machine.vcpus, || self.load())?;
        if cancelled.is_cancelled() {
            return Err(cancelled_error());
        }
        let mut records = new_records(&request, &loaded, self.engine())?;
        let names: Vec<String> = records.iter().map(|r| r.id.to_string()).collect();
        let wish = wish(&request, &loaded.manifest, &inner.config)?;
        let places = inner.context.places.take_all(&names, &wish).await?;
        crash::point("fork: places taken");
        for (record, place) in records.iter_mut().zip(&places) {
            record.place = place.record();
        }
        if let Err(e) = inner.context.records.insert(records.clone()).await {
            for place in &places {
                inner.context.places.give_back(place).await;
            }
            return Err(e.into());
        }
        crash::point("fork: recorded");
        let residents = records.into_iter().zip(places).collect();
        let children = self.start_actors(residents, &request, requested)?;
        room.listed();
        let ids: Vec<Handle> = children.iter().map(|c| c.handle.clone()).collect();
        let _stops = StopOnCancel::watch(&inner.tasks, cancelled.clone(), ids);
        let dirs = self.make_dirs(&children).await;
        let work = children
            .into_iter()
            .map(|child| self.child(&loaded, child, &dirs));
        let outcomes = futures_util::stream::iter(work)
            .buffered(limits::FORKS_AT_ONCE)
            .collect()
            .await;
        let outcome = summary(outcomes, template_ready);
        self.judge(outcome, &request, &cancelled).await
    }

    fn start_actors(
        &self,
        residents: Vec<(SandboxRecord, Arc<Place>)>,
        request: &ForkRequest,
        requested: Instant,
    ) -> Result<Vec<Child>, Error> {
        let resumes: Vec<ResumeRequest> = residents
            .iter()
            .map(|(record, place)| resume_request(record, place, request))
            .collect::<Result<_, _>>()?;
        let children = residents
            .into_iter()
            .zip(resumes)
            .map(|((record, place), resume)| {
                let (vm, arrived) = oneshot::channel();
                let id = record.id.clone();
                let fork = Fork {
                    vm: arrived,
                    resume: Box::new(resume),
                    requested,
                    ready_timeout: request.ready_timeout,
                };
                let (handle, task) = actor::forked(
                    Arc::clone(&self.inner.context),
                    record,
                    Arc::clone(&place),
                    fork,
                );
                self.inner.tasks.spawn(task);
                self.lock().insert(id.clone(), handle.clone());
                Child {
                    id,
                    handle,
                    vm,
                    place,
                }
            });
        Ok(children.collect())
    }

    /// The run directories of all children, made in one go: a thousand small tasks would keep the processors from
    /// everything else.
    async fn make_dirs(&self, children: &[Child]) -> Result<(), String> {
        let dir = |child: &Child| self.inner.config.run_dir.join(child.id.as_str());
        let dirs: Vec<_> = children.iter().map(dir).collect();
        let made = blocking(move || dirs.iter().try_for_each(|dir| file::create_dir(dir))).await;
        crash::point("fork: directory made");
        match made {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(chain(&e)),
            Err(e) => Err(e.chain()),
        }
    }

    /// Brings one fork up, and waits until it runs or has ended.
    async fn child(
        &self,
        loaded: &Loaded,
        child: Child,
        dirs: &Result<(), String>,
    ) -> Result<SandboxView, Error> {
        let forked = match (dirs, child.handle.status()) {
            (Err(why), _) => Err(Error::new(ErrorCode::Internal, why.clone())),
            (Ok(()), SandboxStatus::Starting) => match self.fork_spec(&child) {
                Ok(spec) => fork_one(loaded.template.as_ref(), spec).await,
                Err(e) => Err(e),
            },
            (Ok(()), _) => Err(not_begun(&child.handle)),
        };
        let failure = deliver(child.vm, forked).await;
        let view = child.handle.settled().await;
        match (view.status, failure) {
            (SandboxStatus::Running | SandboxStatus::Paused, _) => Ok(view),
            (_, Some(failure)) => Err(failure),
            (_, None) => {
                let why = view.ended.unwrap_or_else(|| "it ended".to_owned());
                Err(Error::new(
                    ErrorCode::GuestUnreachable,
                    format!("sandbox {}: {why}", view.id),
                ))
            }
        }
    }

    fn fork_spec(&self, child: &Child) -> Result<ForkSpec, Error> {
        Ok(ForkSpec {
            id: child.id.to_string(),
            run_dir: self.inner.config.run_dir.join(child.id.as_str()),
            lifetime: self.inner.config.lifetime,
            slot: Some(child.place.handles(self.inner.engine.opens_taps())?),
        })
    }

    /// All or nothing, unless a part is welcome.
    async fn judge(
        &self,
        mut outcome: ForkOutcome,
        request: &ForkRequest,
        cancelled: &CancellationToken,
    ) -> Result<ForkOutcome, Error> {
        let failed = outcome.children.iter().filter(|c| c.is_err()).count();
        let undo = cancelled.is_cancelled() || (failed > 0 && !request.partial);
        if !undo {
            return Ok(outcome);
        }
        let live = outcome
            .children
            .iter()
            .filter_map(|c| c.as_ref().ok())
            .map(|v| v.id.clone());
        let kills = live.map(|id| async move {
            self.kill_because(&id, Ending::Undone, "its fan-out failed")
                .await
        });
        join_all(kills.collect::<Vec<_>>()).await;
        if cancelled.is_cancelled() {
            return Err(cancelled_error());
        }
        let first = outcome.children.drain(..).find_map(Result::err);
        let cause = first.unwrap_or_else(|| Error::new(ErrorCode::Internal, "unknown"));
        let text = format!(
            "{failed} of {} forks of {} failed, all were undone: {}",
            request.n,
            request.tag,
            cause.chain()
        );
        let error = Error::new(cause.code(), text);
        Err(match cause.remedy() {
            Some(remedy) => error.with_remedy(remedy),
            None => error,
        })
    }
}

/// A sandbox that was stopped while it waited for its turn.
fn not_begun(handle: &Handle) -> Error {
    let view = handle.view();
    let why = view.ended.unwrap_or_default();
    Error::new(ErrorCode::NotReady, format!("sandbox {}: {why}", view.id))
}

struct Child {
    id: SandboxId,
    handle: Handle,
    vm: VmSender,
    place: Arc<Place>,
}

async fn fork_one(template: &dyn Template, spec: ForkSpec) -> Result<Arc<dyn Vm>, Error> {
    let mut results = template.fork(vec![spec]).await;
    crash::point("fork: VM made");
    match results.pop() {
        Some(result) => result.map_err(Error::from),
        None => Err(Error::new(
            ErrorCode::Internal,
            "the engine answered no fork",
        )),
    }
}

/// Hands the VM to its actor. A VM that nobody takes is killed. Answers the failure, if it was one.
async fn deliver(to: VmSender, forked: Result<Arc<dyn Vm>, Error>) -> Option<Error> {
    let (message, failure) = match forked {
        Ok(vm) => (Ok(vm), None),
        Err(e) => (Err(e.chain()), Some(e)),
    };
    if let Err(Ok(vm)) = to.send(message) {
        // Only a panic of the actor leads here; the VM's own error would add nothing.
        let _ = vm.kill().await;
    }
    failure
}

/// Stops the children as soon as the caller goes away, instead of when the last of them has answered.
struct StopOnCancel(CancellationToken);

impl StopOnCancel {
    fn watch(
        tasks: &tokio_util::task::TaskTracker,
        cancelled: CancellationToken,
        children: Vec<Handle>,
    ) -> Self {
        let done = CancellationToken::new();
        let watched = done.clone();
        tasks.spawn(async move {
            tokio::select! {
                // Both are true once the caller has its answer and lets go of the request.
                biased;
                () = watched.cancelled() => {}
                () = cancelled.cancelled() => {
                    let why = "its caller went away";
                    children.iter().for_each(|child| child.stop(Ending::Undone, why));
                }
            }
        });
        Self(done)
    }
}

impl Drop for StopOnCancel {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

fn summary(children: Vec<Result<SandboxView, Error>>, template: Duration) -> ForkOutcome {
    let stage = |of: fn(&SandboxView) -> Duration| {
        children
            .iter()
            .filter_map(|c| c.as_ref().ok())
            .map(of)
            .max()
            .unwrap_or_default()
    };
    let (forked, ready) = (stage(|v| v.stages.forked), stage(|v| v.stages.ready));
    ForkOutcome {
        children,
        template,
        forked,
        ready,
    }
}

fn new_records(
    request: &ForkRequest,
    loaded: &Loaded,
    engine: &str,
) -> Result<Vec<SandboxRecord>, Error> {
    let created_at_unix = now_unix();
    let deadline_unix = request
        .timeout
        .map(|t| created_at_unix + t.as_secs().max(1));
    let record = |index| {
        Ok(SandboxRecord {
            id: ids::sandbox()?,
            tag: request.tag.clone(),
            snapshot_id: loaded.manifest.id.to_string(),
            index,
            state: State::Starting,
            process: None,
            engine: engine.to_owned(),
            created_at_unix,
            deadline_unix,
            metadata: request.metadata.clone(),
            memory_limit_mib: request.memory_limit_mib,
            branches: 0,
            place: PlaceRecord::default(),
            request: request.repeatable.clone(),
        })
    };
    (0..request.n).map(record).collect()
}

/// What the forks want of the host.
fn wish(request: &ForkRequest, manifest: &Manifest, config: &NodeConfig) -> Result<Wish, Error> {
    let device = manifest.machine.network;
    let wanted = request.network.as_ref();
    if !device && wanted.is_some_and(|policy| policy.mode() == Mode::Nat) {
        let text = format!("snapshot {} was made without a network device", request.tag);
        let error = Error::new(ErrorCode::InvalidArgument, text);
        return Err(error.with_remedy("make the snapshot again, or ask for the network mode none"));
    }
    Ok(Wish {
        device,
        vcpus: manifest.machine.vcpus,
        policy: request.network.clone(),
        memory_mib: request.memory_limit_mib,
        limits: PlaceLimits {
            cpu_milli: request.cpu_limit_milli,
            pids: request.pids_limit,
            io: request.io_limit,
        },
        files: vec![
            manifest.image.rootfs.clone(),
            config.snapshot_root.clone(),
            config.run_dir.clone(),
        ],
    })
}

fn resume_request(
    record: &SandboxRecord,
    place: &Place,
    request: &ForkRequest,
) -> Result<ResumeRequest, Error> {
    Ok(ResumeRequest {
        sandbox_id: record.id.to_string(),
        index: record.index,
        entropy: ids::entropy()?,
        // Set when it is sent: minutes may pass until then.
        wall_clock_ns: 0,
        hostname: record.id.to_string(),
        machine_id: ids::machine_id()?,
        env: request.env.clone(),
        network: place.guest_network(),
    })
}

/// What one more idle VM process takes for itself, roughly; a floor for admission, not a promise.
fn private_mib(engine: &str) -> u64 {
    match engine {
        "qemu" => 24,
        "firecracker" => 4,
        _ => 1,
    }
}
