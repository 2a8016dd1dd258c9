//! The client of the agent inside a sandbox.
//!
//! One HTTP/2 connection per sandbox, made when it is first needed and shared by all calls; when it
//! breaks, the next call makes another. The guest is not trusted: every answer is bounded, and one
//! that cannot be understood is an error like any other. Every call has a deadline.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use forkd_engine::{Error as EngineError, GuestStream, Vm};
use forkd_wire::agent::{
    EVAL_PATH, EvalRequest, EvalResponse, HEALTH_PATH, Health, RESUME_PATH, ResumeRequest,
    ResumeResponse, SHUTDOWN_PATH,
};
use http::{Method, Request};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

mod error;
mod exec;
mod files;
mod rpc;
mod tunnel;

pub use error::Error;
pub use exec::{Event, Exec, ExecRequest, Exit, Output, ProcessHandle};
pub use files::FileStream;
pub use tunnel::Tunnel;

/// How requests carry what they send.
type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What the guest may send ahead on one call, and on all of them, bytes.
const STREAM_WINDOW: u32 = 512 << 10;
const CONNECTION_WINDOW: u32 = 2 << 20;
/// The longest header block the guest may send.
const MAX_HEADERS: u32 = 16 << 10;
/// Pauses between attempts to reach a guest that is coming up.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Opens connections to one guest.
#[async_trait]
pub trait Dial: Send + Sync + std::fmt::Debug {
    /// Opens a connection to the agent. It may end the one before.
    async fn dial(&self) -> Result<Box<dyn GuestStream>, EngineError>;
}

#[derive(Debug)]
struct VmDial(Arc<dyn Vm>);

#[async_trait]
impl Dial for VmDial {
    async fn dial(&self) -> Result<Box<dyn GuestStream>, EngineError> {
        self.0.dial().await
    }
}

/// The agent of one sandbox. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dial: Arc<dyn Dial>,
    connection: Mutex<Option<Connection>>,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Body>,
    tasks: Tasks,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.take().abort_all();
    }
}

/// The tasks that move a connection's bytes. They go on until nobody needs them, unless they are ended
/// here: the connection must be gone before its VM is frozen.
#[derive(Debug, Clone, Default)]
struct Tasks(Arc<std::sync::Mutex<JoinSet<()>>>);

impl Tasks {
    fn take(&self) -> JoinSet<()> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future + Send + 'static,
{
    fn execute(&self, future: F) {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while set.try_join_next().is_some() {}
        set.spawn(async move {
            future.await;
        });
    }
}

impl Client {
    /// A client for the agent in `vm`. Nothing is connected yet.
    pub fn new(vm: Arc<dyn Vm>) -> Self {
        Self::with_dial(Arc::new(VmDial(vm)))
    }

    /// A client that reaches its agent with `dial`.
    pub fn with_dial(dial: Arc<dyn Dial>) -> Self {
        Self {
            shared: Arc::new(Shared {
                dial,
                connection: Mutex::default(),
            }),
        }
    }

    /// Waits until the agent answers: a guest that is coming up is tried again and again.
    pub async fn health(&self, deadline: Duration) -> Result<Health, Error> {
        let what = "health";
        let mut attempts = Attempts::new(what, deadline);
        loop {
            let request = rpc::request(Method::GET, HEALTH_PATH, rpc::full(""), what)?;
            let result = rpc::unary(self, what, request, attempts.left()).await;
            if let Some(result) = attempts.judge(result).await {
                return result;
            }
        }
    }

    /// Makes the fork an individual. Tried again until it is answered, which does no harm.
    pub async fn resume(
        &self,
        request: &ResumeRequest,
        deadline: Duration,
    ) -> Result<ResumeResponse, Error> {
        let mut attempts = Attempts::new("resume", deadline);
        loop {
            let result = self
                .call("resume", RESUME_PATH, request, attempts.left())
                .await;
            if let Some(result) = attempts.judge(result).await {
                return result;
            }
        }
    }

    /// Runs code in the guest's interpreter. `deadline` is for the call and its wait in the queue;
    /// the code's own limit is in the request.
    pub async fn eval(
        &self,
        request: EvalRequest,
        deadline: Duration,
    ) -> Result<EvalResponse, Error> {
        self.call("eval", EVAL_PATH, &request, deadline).await
    }

    /// Asks the guest to switch itself off. It answers before it does.
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), Error> {
        let empty = serde_json::json!({});
        self.call::<_, serde_json::Value>("shutdown", SHUTDOWN_PATH, &empty, deadline)
            .await?;
        Ok(())
    }

    /// Ends the connection; calls under way fail. Processes in the guest go on: it takes a lost
    /// connection for that, and not for a wish to end them. The next call connects again.
    pub async fn disconnect(&self) {
        let ended = self.shared.connection.lock().await.take();
        if let Some(connection) = ended {
            let mut tasks = connection.tasks.take();
            tasks.shutdown().await;
        }
    }

    /// A unary call in Connect JSON.
    async fn call<Q, A>(
        &self,
        what: &'static str,
        path: &'static str,
        message: &Q,
        deadline: Duration,
    ) -> Result<A, Error>
    where
        Q: serde::Serialize,
        A: serde::de::DeserializeOwned,
    {
        let request = rpc::unary_request(what, path, message)?;
        rpc::unary(self, what, request, deadline).await
    }

    /// The connection there is, or a new one.
    async fn sender(&self) -> Result<SendRequest<Body>, Error> {
        let mut connection = self.shared.connection.lock().await;
        if let Some(found) = connection.as_ref()
            && !found.sender.is_closed()
        {
            return Ok(found.sender.clone());
        }
        *connection = None;
        let stream = self.shared.dial.dial().await.map_err(Error::Dial)?;
        let tasks = Tasks::default();
        let (sender, driver) = http2::Builder::new(tasks.clone())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEADERS)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| Error::Lost {
                what: "connect",
                source: Some(source),
            })?;
        hyper::rt::Executor::execute(&tasks, async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "the connection to a guest broke");
            }
        });
        *connection = Some(Connection {
            sender: sender.clone(),
            tasks,
        });
        Ok(sender)
    }

    /// Sends a request and waits for the head of its answer.
    async fn send(
        &self,
        what: &'static str,
        request: Request<Body>,
    ) -> Result<http::Response<hyper::body::Incoming>, Error> {
        let mut sender = self.sender().await?;
        let lost = |source| Error::Lost {
            what,
            source: Some(source),
        };
        sender.ready().await.map_err(lost)?;
        sender.send_request(request).await.map_err(lost)
    }
}

/// Repeats a call, which may be repeated, until the guest has been reached.
#[derive(Debug)]
struct Attempts {
    what: &'static str,
    deadline: Duration,
    end: Instant,
    pause: Duration,
}

impl Attempts {
    fn new(what: &'static str, deadline: Duration) -> Self {
        Self {
            what,
            deadline,
            end: Instant::now() + deadline,
            pause: FIRST_PAUSE,
        }
    }

    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Takes a result as the final one, or waits a little before the next attempt.
    async fn judge<T>(&mut self, result: Result<T, Error>) -> Option<Result<T, Error>> {
        match result {
            Err(error) if error.is_passing() && self.left() > self.pause => {
                tracing::debug!(what = self.what, %error, "the guest is not there yet");
                tokio::time::sleep(self.pause).await;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                None
            }
            // What was left for the last attempt is not what the caller gave.
            Err(Error::Timeout { what, .. }) => Some(Err(Error::timeout(what, self.deadline))),
            result => Some(result),
        }
    }
}

/// Runs `work` for no longer than `deadline`.
async fn within<T>(
    what: &'static str,
    deadline: Duration,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(deadline, work)
        .await
        .unwrap_or_else(|_| Err(Error::timeout(what, deadline)))
}
