//! Eval: code in an interpreter that stays.
//!
//! The interpreter is a child that was started once, before the snapshot; every fork inherits it
//! with all it has imported. Evaluations wait in a queue. One that takes too long is interrupted;
//! if that does not help, the interpreter is killed, the caller is told that its state is lost, and
//! the next evaluation starts a fresh one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use forkd_wire::agent::connect::Code;
use forkd_wire::agent::{EvalRequest, EvalResponse};
use tokio::sync::{Mutex, oneshot};

use crate::agent::{Agent, find_program};
use crate::process::table::Table;
use crate::rpc::{Connection, Fault};

mod interpreter;

use interpreter::{Ended, Interpreter};

/// Evaluations that wait at once.
const MAX_QUEUED: usize = 64;

/// The Python interpreter, started when first needed.
#[derive(Debug)]
pub(crate) struct Python {
    table: Arc<Table>,
    running: Mutex<Option<Interpreter>>,
    /// Reaches the interpreter while it evaluates.
    reseeder: Mutex<Option<interpreter::Reseeder>>,
    queued: AtomicUsize,
}

/// The interpreter's path in the guest.
pub(crate) fn find(env: &BTreeMap<String, String>) -> Option<PathBuf> {
    ["python3", "python"]
        .iter()
        .find_map(|name| find_program(name, env, Path::new("/")))
}

impl Python {
    pub(crate) fn new(table: Arc<Table>) -> Self {
        Self {
            table,
            running: Mutex::default(),
            reseeder: Mutex::default(),
            queued: AtomicUsize::new(0),
        }
    }

    /// Tells the interpreter, if there is one, to become another individual. Works while it
    /// evaluates. Returns what reseeded.
    pub(crate) async fn reseed(
        &self,
        env: &BTreeMap<String, String>,
    ) -> Result<Vec<String>, Fault> {
        let mut reseeder = self.reseeder.lock().await;
        match &mut *reseeder {
            Some(reseeder) if !reseeder.is_gone() => reseeder.reseed(env).await,
            _ => Ok(Vec::new()),
        }
    }

    async fn evaluate(
        &self,
        env: BTreeMap<String, String>,
        request: EvalRequest,
        cancelled: oneshot::Receiver<()>,
    ) -> Result<EvalResponse, Fault> {
        let mut running = self.running.lock().await;
        if running.as_ref().is_none_or(Interpreter::is_gone) {
            *running = None;
            let path = find(&env).ok_or_else(missing)?;
            let (interpreter, reseeder) = Interpreter::start(&path, &env, &self.table).await?;
            *running = Some(interpreter);
            *self.reseeder.lock().await = Some(reseeder);
        }
        let Some(interpreter) = running.as_mut() else {
            return Err(missing());
        };
        if request.code.is_empty() {
            return Ok(EvalResponse::default());
        }
        let limit = match request.timeout_ms {
            0 => None,
            millis => Some(Duration::from_millis(millis)),
        };
        let ended = interpreter.evaluate(&request.code, limit, cancelled).await;
        if !matches!(ended, Ended::Answered(_) | Ended::Interrupted) {
            *running = None;
            *self.reseeder.lock().await = None;
        }
        answer(ended, request.timeout_ms)
    }
}

fn answer(ended: Ended, millis: u64) -> Result<EvalResponse, Fault> {
    let late = |rest: &str| {
        let message = if millis == 0 {
            format!("the evaluation was cancelled; {rest}")
        } else {
            format!("the code did not finish within {millis} ms; {rest}")
        };
        Err(Fault::new(Code::DeadlineExceeded, message))
    };
    match ended {
        Ended::Answered(answer) => Ok(answer),
        Ended::Interrupted => late("it was interrupted, and the interpreter keeps its state"),
        Ended::Killed => late(
            "it could not be interrupted, so the interpreter was killed and its state is lost; the \
             next eval starts a fresh one",
        ),
        Ended::Died { how, stderr } => Err(Fault::new(
            Code::Aborted,
            format!(
                "the Python interpreter ended ({how}) and its state is lost; the next eval starts a \
                 fresh one{}{}",
                if stderr.is_empty() { "" } else { ": " },
                stderr.trim_end()
            ),
        )),
    }
}

fn missing() -> Fault {
    Fault::new(
        Code::FailedPrecondition,
        "the guest has no python3, which eval needs; build an image with it, for example `forkd \
         image build --debian python3`, or use exec",
    )
}

/// Tells the evaluation that its caller has cancelled it. A lost connection does not cancel.
struct CancelOnDrop {
    cancel: Option<oneshot::Sender<()>>,
    connection: Arc<Connection>,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancel) = self.cancel.take()
            && !self.connection.is_lost()
        {
            let _ = cancel.send(());
        }
    }
}

/// Counts one that waits.
struct Place(Arc<Python>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

/// `Eval`.
pub(crate) async fn call(
    agent: &Agent,
    request: EvalRequest,
    connection: Arc<Connection>,
) -> Result<EvalResponse, Fault> {
    if request.language != "python" {
        return Err(Fault::invalid(format!(
            "eval does not know the language {:?}; it knows python",
            request.language
        )));
    }
    let python = Arc::clone(&agent.python);
    let queued = python.queued.fetch_add(1, Ordering::Relaxed);
    let place = Place(Arc::clone(&python));
    if queued >= MAX_QUEUED {
        return Err(Fault::new(
            Code::ResourceExhausted,
            format!("{queued} evaluations wait already; there is one interpreter in a sandbox"),
        ));
    }
    let (cancel, cancelled) = oneshot::channel();
    let _guard = CancelOnDrop {
        cancel: Some(cancel),
        connection,
    };
    let env = agent.env();
    // In a task of its own, so that the interpreter is never left in the middle of an exchange.
    let task = tokio::spawn(async move {
        let _place = place;
        python.evaluate(env, request, cancelled).await
    });
    task.await
        .map_err(|_| Fault::new(Code::Internal, "the evaluation failed inside the agent"))?
}
