//! One task per sandbox. It owns the machine and the VM, performs the effects, and is the only one that
//! changes the sandbox's record.
//!
//! Ending a sandbox has a lane of its own: a stop is seen at once, whatever effect is under way, and cancels
//! it. The order within the loop is stop, exit of the VM, end of the effect, deadline, request.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forkd_engine::{Branch, Exit, SaveReport, SaveSpec, Vm};
use forkd_host::chain;
use forkd_wire::agent::ResumeRequest;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Instrument, error, info, warn};

use crate::machine::{Effect, Input, Machine, Refused, State};
use crate::place::{Place, Places};
use crate::record::{Records, SandboxRecord};
use crate::view::{Ending, ForkStages, SandboxView};
use crate::{Error, console, crash, guest, limits};

mod deadline;
mod handle;
mod view;

pub(crate) use handle::{Handle, Request};
use handle::{INBOX, Stop};
use view::view_of;

/// What every actor of a node shares.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) records: Records,
    pub(crate) run_dir: PathBuf,
    pub(crate) places: Arc<Places>,
}

/// A fork under way.
#[derive(Debug)]
pub(crate) struct Fork {
    /// Brings the VM, or why there is none.
    pub(crate) vm: oneshot::Receiver<Result<Arc<dyn Vm>, String>>,
    /// What the agent is to be told.
    pub(crate) resume: Box<ResumeRequest>,
    /// When it was asked for.
    pub(crate) requested: Instant,
    /// How long after that the agent must have answered.
    pub(crate) ready_timeout: Duration,
}

pub(crate) struct Actor {
    machine: Machine,
    record: SandboxRecord,
    context: Arc<Context>,
    vm: Arc<OnceLock<(Arc<dyn Vm>, guest::Client)>>,
    greeting: Option<Greeting>,
    stages: ForkStages,
    /// When it is to be killed.
    deadline: Option<tokio::time::Instant>,
    /// What ends it; the first cause stays.
    ending: Option<Ending>,
    view: watch::Sender<SandboxView>,
    place: Arc<Place>,
    requests: mpsc::Receiver<Request>,
    stop: watch::Receiver<Option<Stop>>,
    /// Separate from `pending`: a VM that is being forked must be waited for before it can be killed.
    forking: Option<oneshot::Receiver<Result<Arc<dyn Vm>, String>>>,
    exited: Option<Pin<Box<dyn Future<Output = Exit> + Send>>>,
    pending: Option<Pin<Box<dyn Future<Output = Outcome> + Send>>>,
}

struct Greeting {
    resume: Box<ResumeRequest>,
    requested: Instant,
    timeout: Duration,
}

/// How an effect under way ended.
enum Outcome {
    Forked(Result<Arc<dyn Vm>, String>),
    Greeted(Result<(), String>),
    Switched(
        Result<(), Error>,
        Option<oneshot::Sender<Result<(), Error>>>,
    ),
    Saved(
        Result<SaveReport, Error>,
        oneshot::Sender<Result<SaveReport, Error>>,
    ),
    Branched(
        Result<Branch, Error>,
        oneshot::Sender<Result<Branch, Error>>,
    ),
}

enum Event {
    Stop(Stop),
    Exited(Exit),
    Finished(Outcome),
    Request(Request),
}

/// The task of a sandbox that is being forked, its record just written; and the handle.
pub(crate) fn forked(
    context: Arc<Context>,
    record: SandboxRecord,
    place: Arc<Place>,
    fork: Fork,
) -> (Handle, impl Future<Output = ()> + Send + 'static) {
    let (mut actor, handle) = Actor::new(context, record, place);
    actor.greeting = Some(Greeting {
        resume: fork.resume,
        requested: fork.requested,
        timeout: fork.ready_timeout,
    });
    actor.forking = Some(fork.vm);
    (handle, actor.into_task())
}

/// The task of a sandbox read from its record, and of its VM if that still runs. When this returns, the sandbox
/// goes on, or nothing of it is left.
pub(crate) async fn recovered(
    context: Arc<Context>,
    record: SandboxRecord,
    vm: Option<Arc<dyn Vm>>,
) -> (Handle, impl Future<Output = ()> + Send + 'static) {
    let place = Arc::new(context.places.adopt(&record.place).await);
    let (mut actor, handle) = Actor::new(context, record, place);
    let alive = vm.is_some();
    if let Some(vm) = vm {
        actor.take_vm(vm);
    }
    actor.set_deadline(SystemTime::now());
    actor.apply(Input::Observed { alive }, None).await;
    (handle, actor.into_task())
}

impl Actor {
    fn new(context: Arc<Context>, record: SandboxRecord, place: Arc<Place>) -> (Actor, Handle) {
        let (requests, inbox) = mpsc::channel(INBOX);
        let (stop, stop_seen) = watch::channel(None);
        let vm = Arc::new(OnceLock::new());
        let (view, view_seen) =
            watch::channel(view_of(&record, &place, ForkStages::default(), None));
        let actor = Actor {
            machine: Machine::recorded(record.state.clone()),
            deadline: None,
            ending: None,
            record,
            context,
            vm: Arc::clone(&vm),
            greeting: None,
            stages: ForkStages::default(),
            view,
            place,
            requests: inbox,
            stop: stop_seen,
            forking: None,
            exited: None,
            pending: None,
        };
        (
            actor,
            Handle {
                view: view_seen,
                requests,
                stop,
                vm,
            },
        )
    }

    fn into_task(mut self) -> impl Future<Output = ()> + Send + 'static {
        let span = tracing::info_span!("sandbox", id = %self.record.id);
        async move { self.run().await }.instrument(span)
    }

    async fn run(&mut self) {
        while !matches!(self.machine.state(), State::Ended { .. }) {
            let event = self.next_event().await;
            self.on_event(event).await;
        }
    }

    async fn next_event(&mut self) -> Event {
        let deadline = self.deadline;
        tokio::select! {
            biased;
            stop = stop_asked(&mut self.stop) => Event::Stop(stop),
            exit = present(&mut self.exited) => {
                self.exited = None;
                Event::Exited(exit)
            }
            vm = arrival(&mut self.forking) => {
                self.forking = None;
                Event::Finished(Outcome::Forked(vm))
            }
            outcome = present(&mut self.pending) => {
                self.pending = None;
                Event::Finished(outcome)
            }
            () = deadline::reached(deadline) => Event::Stop(deadline::passed()),
            Some(request) = self.requests.recv(), if self.pending.is_none() => Event::Request(request),
        }
    }

    async fn on_event(&mut self, event: Event) {
        match event {
            Event::Stop(Stop { ending, why }) => {
                self.ending.get_or_insert(ending);
                self.apply(Input::Stop(why), None).await;
            }
            Event::Exited(exit) => {
                let why = match self.place.ran_out_of_memory() {
                    true => self.ran_out_of_memory(),
                    false => self.describe_exit(&exit),
                };
                self.apply(Input::Exited(why), None).await;
            }
            Event::Finished(outcome) => self.on_outcome(outcome).await,
            Event::Request(Request::Pause(reply)) => {
                self.apply(Input::Pause, Some(Reply::Switch(reply))).await;
            }
            Event::Request(Request::Resume(reply)) => {
                self.apply(Input::Resume, Some(Reply::Switch(reply))).await;
            }
            Event::Request(Request::Network(policy, reply)) => {
                let changed = self.context.places.set_policy(&self.place, policy).await;
                self.record.place = self.place.record();
                let state = self.machine.state().clone();
                self.persist(state).await;
                let _ = reply.send(changed);
            }
            Event::Request(Request::Save(spec, reply)) => {
                self.apply(Input::Freeze, Some(Reply::Save(spec, reply)))
                    .await;
            }
            Event::Request(Request::Branch(reply)) => {
                self.apply(Input::Freeze, Some(Reply::Branch(reply))).await;
            }
        }
    }

    async fn on_outcome(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Forked(Ok(vm)) => {
                self.record.process = Some(vm.identity());
                self.stages.forked = self.since_request();
                self.take_vm(vm);
                self.apply(Input::Forked(Ok(())), None).await;
            }
            Outcome::Forked(Err(why)) => self.apply(Input::Forked(Err(why)), None).await,
            Outcome::Greeted(result) => {
                self.stages.ready = self.since_request();
                self.live_from_now();
                self.apply(Input::Greeted(result), None).await;
            }
            Outcome::Switched(result, reply) => {
                crash::point("sandbox: vCPUs switched");
                let told = result.as_ref().map(|&()| ()).map_err(Error::chain);
                self.apply(Input::Switched(told), None).await;
                if let Some(reply) = reply {
                    let _ = reply.send(result);
                }
            }
            Outcome::Saved(result, reply) => {
                self.record.branches += u32::from(result.is_ok());
                self.apply(Input::Frozen, None).await;
                let _ = reply.send(result);
            }
            Outcome::Branched(result, reply) => {
                self.record.branches += u32::from(result.is_ok());
                self.apply(Input::Frozen, None).await;
                // Nobody may wait any more: then the branch's template goes with its handle.
                let _ = reply.send(result);
            }
        }
    }

    /// A sandbox gets the time that was asked for from when it can be used: until then the request has a limit of
    /// its own.
    fn live_from_now(&mut self) {
        let now = SystemTime::now();
        let record = &mut self.record;
        let asked = record
            .deadline_unix
            .map(|unix| unix.saturating_sub(record.created_at_unix));
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        record.deadline_unix = asked.map(|secs| since.as_secs().saturating_add(secs));
        self.deadline = asked.map(|secs| tokio::time::Instant::now() + Duration::from_secs(secs));
    }

    fn set_deadline(&mut self, now: SystemTime) {
        let record = &self.record;
        let left = record
            .deadline_unix
            .map(|unix| deadline::left(record.created_at_unix, unix, now));
        self.deadline = left.map(|left| tokio::time::Instant::now() + left);
    }

    fn take_vm(&mut self, vm: Arc<dyn Vm>) {
        let watched = Arc::clone(&vm);
        self.exited = Some(Box::pin(async move { watched.exited().await }));
        let client = guest::Client::new(Arc::clone(&vm));
        // Set once: a sandbox has one VM in its life.
        let _ = self.vm.set((vm, client));
    }

    fn since_request(&self) -> Duration {
        self.greeting
            .as_ref()
            .map_or(Duration::ZERO, |g| g.requested.elapsed())
    }

    fn ran_out_of_memory(&mut self) -> String {
        self.ending.get_or_insert(Ending::OutOfMemory);
        let limit = self.record.memory_limit_mib.unwrap_or_default();
        format!("oom: it used more than its {limit} MiB of memory")
    }

    fn describe_exit(&self, exit: &Exit) -> String {
        let how = match exit {
            Exit::Code(0) => "the guest shut down".to_owned(),
            Exit::Code(code) => format!("the VM's process ended with status {code}"),
            Exit::Signal(signal) => format!("the VM's process was killed by signal {signal}"),
            Exit::Reset => "the guest's kernel panicked or rebooted".to_owned(),
            Exit::Unknown => "the VM's process is gone".to_owned(),
        };
        let ready = !matches!(self.machine.state(), State::Starting | State::Greeting);
        match self.vm.get().filter(|_| !ready) {
            Some((vm, _)) => console::with_tail(how, &vm.console()),
            None => how,
        }
    }

    /// Takes the input, writes the record, performs the effects.
    async fn apply(&mut self, input: Input, reply: Option<Reply>) {
        let before = self.machine.state().clone();
        let effects = match self.machine.apply(input) {
            Ok(effects) => effects,
            Err(refused) => return refuse(&self.record.id, refused, reply),
        };
        let state = self.machine.state().clone();
        if state != before {
            info!(from = ?before, to = ?state, "state changed");
            self.persist(state).await;
        }
        match effects.first() {
            None => self.settle(reply),
            Some(Effect::Greet) => self.greet(),
            Some(Effect::Pause) => self.switch(reply, true),
            Some(Effect::Resume) => self.switch(reply, false),
            Some(Effect::Save) => self.save(reply),
            Some(Effect::Clear) => self.clear().await,
        }
    }

    /// Nothing had to be done: the request is answered at once.
    fn settle(&self, reply: Option<Reply>) {
        if let Some(Reply::Switch(reply)) = reply {
            let _ = reply.send(Ok(()));
        }
    }

    async fn persist(&mut self, state: State) {
        self.record.state = state.clone();
        crash::unrecorded(&state);
        let record = &self.record;
        let written = match &record.state {
            State::Ended { .. } => self.context.records.remove(&record.id).await,
            _ => self.context.records.update(record).await,
        };
        if let Err(e) = written {
            // The sandbox goes on: what a later daemon finds in the older record is checked against the
            // world anyway.
            error!(error = %e, "record not written");
        }
        crash::recorded(&self.record.state);
        // Whatever nobody asked for, the VM has done by itself.
        let ending = match state {
            State::Stopping { .. } | State::Ended { .. } => {
                Some(*self.ending.get_or_insert(Ending::Exited))
            }
            _ => None,
        };
        self.view
            .send_replace(view_of(&self.record, &self.place, self.stages, ending));
    }

    fn greet(&mut self) {
        let (Some((_, client)), Some(greeting)) = (self.vm.get(), self.greeting.as_ref()) else {
            return;
        };
        let (client, mut resume) = (client.clone(), greeting.resume.clone());
        let left = greeting
            .timeout
            .saturating_sub(greeting.requested.elapsed());
        let console = self.vm.get().map(|(vm, _)| vm.console());
        self.pending = Some(Box::pin(async move {
            resume.wall_clock_ns = wall_clock_ns();
            let answered = client.resume(&resume, left).await;
            Outcome::Greeted(answered.map(|_| ()).map_err(|e| {
                let why = format!("the guest did not become ready: {}", chain(&e));
                match console {
                    Some(path) => console::with_tail(why, &path),
                    None => why,
                }
            }))
        }));
    }

    fn switch(&mut self, reply: Option<Reply>, pause: bool) {
        let Some((vm, _)) = self.vm.get() else { return };
        let vm = Arc::clone(vm);
        let reply = match reply {
            Some(Reply::Switch(reply)) => Some(reply),
            _ => None,
        };
        self.pending = Some(Box::pin(async move {
            let done = if pause {
                vm.pause().await
            } else {
                vm.resume().await
            };
            Outcome::Switched(done.map_err(Error::from), reply)
        }));
    }

    fn save(&mut self, reply: Option<Reply>) {
        let Some((vm, client)) = self.vm.get() else {
            return;
        };
        let (vm, client) = (Arc::clone(vm), client.clone());
        self.pending = match reply {
            Some(Reply::Save(spec, reply)) => Some(Box::pin(async move {
                // A fork must not find itself inside somebody else's conversation.
                client.disconnect().await;
                Outcome::Saved(in_time(vm.save(spec)).await, reply)
            })),
            Some(Reply::Branch(reply)) => Some(Box::pin(async move {
                client.disconnect().await;
                Outcome::Branched(in_time(vm.branch()).await, reply)
            })),
            Some(Reply::Switch(_)) | None => return,
        };
    }

    /// Kills the VM and removes its files. What cannot be removed is logged and left to the next sweep.
    async fn clear(&mut self) {
        self.pending = None;
        let vm = self.vm_to_kill().await;
        if let Some(vm) = vm {
            match tokio::time::timeout(limits::KILL_TIMEOUT, vm.kill()).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => error!(error = chain(&e), "VM may have leaked"),
                Err(_) => error!("VM may have leaked: its process does not go away"),
            }
        }
        self.exited = None;
        crash::point("sandbox: VM killed");
        let dir = self.context.run_dir.join(self.record.id.as_str());
        if let Err(e) = tokio::fs::remove_dir_all(&dir).await
            && e.kind() != std::io::ErrorKind::NotFound
        {
            warn!(error = %e, dir = %dir.display(), "files may have leaked");
        }
        self.context.places.give_back(&self.place).await;
        Box::pin(self.apply(Input::Cleared, None)).await;
    }

    /// The VM, also one whose fork is still under way.
    async fn vm_to_kill(&mut self) -> Option<Arc<dyn Vm>> {
        if let Some(forking) = self.forking.take() {
            return forking.await.ok()?.ok();
        }
        self.vm.get().map(|(vm, _)| Arc::clone(vm))
    }
}

enum Reply {
    Switch(oneshot::Sender<Result<(), Error>>),
    Save(SaveSpec, oneshot::Sender<Result<SaveReport, Error>>),
    Branch(oneshot::Sender<Result<Branch, Error>>),
}

async fn in_time<T>(
    work: impl Future<Output = Result<T, forkd_engine::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limits::SAVE_TIMEOUT, work).await {
        Ok(result) => result.map_err(Error::from),
        Err(_) => Err(timed_out("branch")),
    }
}

fn refuse(id: &SandboxId, refused: Refused, reply: Option<Reply>) {
    let text = match refused {
        Refused::Starting => "is not ready yet",
        Refused::Branching => "is being branched",
        Refused::Ended => "has ended",
        Refused::Stale => return,
    };
    let error = Error::new(ErrorCode::NotReady, format!("sandbox {id} {text}"));
    match reply {
        Some(Reply::Switch(reply)) => drop(reply.send(Err(error))),
        Some(Reply::Save(_, reply)) => drop(reply.send(Err(error))),
        Some(Reply::Branch(reply)) => drop(reply.send(Err(error))),
        None => {}
    }
}

fn timed_out(what: &str) -> Error {
    Error::new(ErrorCode::Timeout, format!("{what} took too long"))
}

async fn stop_asked(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    loop {
        if stop.changed().await.is_err() {
            // Every handle is gone: nobody can ask any more.
            return std::future::pending().await;
        }
        if let Some(asked) = stop.borrow_and_update().clone() {
            return asked;
        }
    }
}

async fn present<T>(future: &mut Option<Pin<Box<dyn Future<Output = T> + Send>>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn arrival(
    forking: &mut Option<oneshot::Receiver<Result<Arc<dyn Vm>, String>>>,
) -> Result<Arc<dyn Vm>, String> {
    match forking {
        Some(vm) => vm
            .await
            .unwrap_or_else(|_| Err("the fork was given up".to_owned())),
        None => std::future::pending().await,
    }
}

pub(crate) fn wall_clock_ns() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
