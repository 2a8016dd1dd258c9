//! What the agent is while it serves: its state, and which call goes where.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use forkd_wire::agent::connect::Code;
use forkd_wire::agent::{self as wire, GuestNetwork, Health, filesystem, process};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::eval::Python;
use crate::process::table::Table;
use crate::rpc::{self, Connection, Fault, Reply};
use crate::{eval, files, metrics, resume, tunnel};

/// Where programs are looked for when the image says nothing.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What the image says of its programs.
const IMAGE_DEFAULTS: &str = "/etc/forkd/image.json";

/// What the image says of its programs. All of it is optional, as is the file.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ImageDefaults {
    /// `NAME=value`.
    env: Vec<String>,
    /// Where programs start that name no directory.
    pub(crate) workdir: String,
    /// Who they run as, if they name nobody: a name or number, and perhaps a group after a colon.
    user: String,
}

impl ImageDefaults {
    fn read() -> Self {
        let text = std::fs::read(IMAGE_DEFAULTS).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// The user programs run as.
    pub(crate) fn user(&self) -> Option<&str> {
        self.user.split(':').next().filter(|user| !user.is_empty())
    }
}

/// Where the agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// As PID 1 of a guest that is its own: it may change clock, names and network.
    Guest,
    /// As a process among others; it leaves the machine alone.
    Host,
}

/// The agent.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) place: Place,
    pub(crate) processes: Arc<Table>,
    pub(crate) python: Arc<Python>,
    /// Asked for by a caller: power off.
    pub(crate) shutdown: Notify,
    pub(crate) image: ImageDefaults,
    /// What the network device was last told.
    pub(crate) network: Mutex<Option<GuestNetwork>>,
    env: Mutex<BTreeMap<String, String>>,
}

impl Agent {
    pub(crate) fn new(place: Place) -> Arc<Self> {
        let processes = Arc::new(Table::default());
        let image = match place {
            Place::Guest => ImageDefaults::read(),
            Place::Host => ImageDefaults::default(),
        };
        Arc::new(Self {
            place,
            python: Arc::new(Python::new(Arc::clone(&processes))),
            processes,
            shutdown: Notify::new(),
            network: Mutex::default(),
            env: Mutex::new(first_env(place, &image)),
            image,
        })
    }

    /// The environment that every process gets.
    pub(crate) fn env(&self) -> BTreeMap<String, String> {
        self.env
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Adds to the environment of every process started from now on.
    pub(crate) fn extend_env(&self, more: BTreeMap<String, String>) {
        self.env
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(more);
    }

    /// Answers a request; a failure is an answer too.
    pub(crate) async fn answer(self: &Arc<Self>, request: Request<Incoming>) -> Reply {
        let path = request.uri().path().to_owned();
        match *request.method() {
            Method::GET | Method::HEAD => self.get(&path, &request),
            Method::POST => self.post(&path, request).await,
            _ => Fault::new(Code::Unimplemented, "only GET and POST are served").unary(),
        }
    }

    fn get(&self, path: &str, request: &Request<Incoming>) -> Reply {
        match path {
            wire::HEALTH_PATH => rpc::json(StatusCode::OK, &self.health()),
            filesystem::ENVS_PATH => rpc::json(StatusCode::OK, &self.env()),
            filesystem::METRICS_PATH => rpc::json(StatusCode::OK, &metrics::read()),
            filesystem::FILES_PATH => files::transfer::download(request),
            _ => unknown(path),
        }
    }

    async fn post(self: &Arc<Self>, path: &str, request: Request<Incoming>) -> Reply {
        use crate::process::service;
        match path {
            process::START_PATH => service::start(self, request).await,
            process::CONNECT_PATH => service::connect(self, request).await,
            process::STREAM_INPUT_PATH => service::stream_input(self, request).await,
            process::LIST_PATH => {
                call(request, async |_: process::ListRequest| {
                    Ok(self.processes.list())
                })
                .await
            }
            process::UPDATE_PATH => call(request, async |r| service::update(self, &r)).await,
            process::SEND_INPUT_PATH => {
                call(request, async |r| service::send_input(self, r).await).await
            }
            process::SEND_SIGNAL_PATH => {
                call(request, async |r| service::send_signal(self, &r)).await
            }
            process::CLOSE_STDIN_PATH => {
                call(request, async |r| service::close_stdin(self, &r).await).await
            }
            wire::RESUME_PATH => call(request, async |r| resume::apply(self, r).await).await,
            wire::EVAL_PATH => {
                let connection = request.extensions().get::<Arc<Connection>>().cloned();
                call(request, async |r| {
                    eval::call(self, r, connection.unwrap_or_default()).await
                })
                .await
            }
            wire::SHUTDOWN_PATH => {
                call(request, async |_: serde_json::Value| {
                    self.shutdown.notify_one();
                    Ok(serde_json::json!({}))
                })
                .await
            }
            filesystem::FILES_PATH => files::transfer::upload(request).await,
            _ => match path.strip_prefix(wire::TUNNEL_PATH_PREFIX) {
                Some(port) => tunnel::open(port, request).await,
                None => files::service::post(path, request)
                    .await
                    .unwrap_or_else(|| unknown(path)),
            },
        }
    }

    fn health(&self) -> Health {
        Health {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: wire::AGENT_PROTOCOL_VERSION,
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            python: eval::find(&self.env()).map(|path| path.to_string_lossy().into_owned()),
        }
    }
}

/// Runs a unary call.
pub(crate) async fn call<Q, A>(
    request: Request<Incoming>,
    serve: impl AsyncFnOnce(Q) -> Result<A, Fault>,
) -> Reply
where
    Q: DeserializeOwned,
    A: Serialize,
{
    let result = match rpc::read_unary(request).await {
        Ok(message) => serve(message).await,
        Err(fault) => Err(fault),
    };
    match result {
        Ok(answer) => rpc::json(StatusCode::OK, &answer),
        Err(fault) => fault.unary(),
    }
}

fn unknown(path: &str) -> Reply {
    Fault::new(
        Code::Unimplemented,
        format!("the agent does not serve {path}"),
    )
    .unary()
}

/// The environment before any fork adds to it.
fn first_env(place: Place, image: &ImageDefaults) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([("PATH".to_owned(), DEFAULT_PATH.to_owned())]);
    if place == Place::Host {
        env.extend(std::env::vars());
    }
    let pairs = image.env.iter().filter_map(|pair| pair.split_once('='));
    env.extend(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())));
    env
}

/// The file a command names: a path relative to `cwd`, or the first executable of that name in the
/// `PATH` of `env`.
pub(crate) fn find_program(
    command: &str,
    env: &BTreeMap<String, String>,
    cwd: &Path,
) -> Option<PathBuf> {
    if command.contains('/') {
        let path = cwd.join(command);
        return path.exists().then_some(path);
    }
    let search = env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
    let executable = |path: &PathBuf| {
        use rustix::fs::{Access, access};
        path.is_file() && access(path, Access::EXEC_OK).is_ok()
    };
    search
        .split(':')
        .map(|dir| cwd.join(dir).join(command))
        .find(executable)
}
