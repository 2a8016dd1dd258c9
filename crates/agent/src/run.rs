//! The agent's event loop: everything it serves, and the reaping of what it started.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_wire::agent::{AGENT_PORT, AGENT_SERIAL_PORT};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::agent::{Agent, Place};
use crate::transport::port::{self, Port};
use crate::{serve, sys};

/// Time for the answer of a shutdown call to leave.
const FAREWELL: Duration = Duration::from_millis(50);
/// Threads for slow file work. Each costs memory in every fork.
const MAX_BLOCKING_THREADS: usize = 4;

/// How long the ports of a serial device may take to appear.
const PORT_LIMIT: Duration = Duration::from_secs(5);
const PORT_STEP: Duration = Duration::from_millis(2);
const SERIAL_DRIVER: &str = "virtio_console";
const VSOCK_DRIVER: &str = "vmw_vsock_virtio_transport";

/// What stops the agent from serving.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The runtime did not start.
    #[error("cannot start the event loop")]
    Runtime(#[source] io::Error),
    /// A transport cannot be opened.
    #[error("cannot serve on {transport}")]
    Listen {
        /// Which.
        transport: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine has no way to the host.
    #[error(
        "there is neither a virtio-serial port named {AGENT_SERIAL_PORT} nor vsock; give the VM one \
         of them, and the initramfs the module virtio_console or vmw_vsock_virtio_transport"
    )]
    NoTransport,
    /// The command line is wrong.
    #[error("{0}; see forkd-agent --help")]
    Usage(String),
    /// A transport failed for good.
    #[error("the transport to the host failed")]
    Transport(#[source] io::Error),
}

fn listen_error(transport: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    |source| Error::Listen {
        transport: transport.into(),
        source,
    }
}

fn block_on(work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(work)
}

/// The serial port to the host. The kernel learns of a serial device's ports a little after it has
/// found the device.
async fn find_port() -> Option<PathBuf> {
    let started = Instant::now();
    while port::has_device(SERIAL_DRIVER) && started.elapsed() < PORT_LIMIT {
        if let Some(path) = port::find(AGENT_SERIAL_PORT) {
            return Some(path);
        }
        tokio::time::sleep(PORT_STEP).await;
    }
    None
}

/// Serves the host over whatever the machine has, until asked to stop.
pub(crate) fn guest() -> Result<(), Error> {
    block_on(async {
        let agent = Agent::new(Place::Guest);
        let mut tasks = JoinSet::new();
        if let Some(path) = find_port().await {
            let port = Port::open(&path).map_err(listen_error(path.to_string_lossy()))?;
            let agent = Arc::clone(&agent);
            tasks.spawn(async move { serve::port(agent, port).await.map_err(Error::Transport) });
        }
        // The socket could be had without a device too, and nobody would ever call.
        if port::has_device(VSOCK_DRIVER) {
            let listener = sys::listen_vsock(AGENT_PORT).map_err(listen_error("vsock"))?;
            let agent = Arc::clone(&agent);
            tasks.spawn(async move {
                serve::vsock(agent, listener)
                    .await
                    .map_err(Error::Transport)
            });
        }
        if tasks.is_empty() {
            return Err(Error::NoTransport);
        }
        run(&agent, tasks).await
    })
}

/// Serves on the transports that the command line names.
pub(crate) fn serve(args: &[&str]) -> Result<(), Error> {
    block_on(async {
        let agent = Agent::new(Place::Host);
        let mut tasks = JoinSet::new();
        let mut sockets = Vec::new();
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            let mut value = || {
                args.next()
                    .copied()
                    .ok_or_else(|| Error::Usage(format!("{flag} needs a value")))
            };
            let served = Arc::clone(&agent);
            match *flag {
                "--unix" | "--link" => {
                    let path = value()?;
                    let listener = UnixListener::bind(path).map_err(listen_error(path))?;
                    sockets.push(RemoveSocket(path.into()));
                    let framed = *flag == "--link";
                    tasks.spawn(async move {
                        serve::unix(served, listener, framed).await;
                        Ok(())
                    });
                }
                "--tcp" => {
                    let address = value()?;
                    let listener = TcpListener::bind(address)
                        .await
                        .map_err(listen_error(address))?;
                    tasks.spawn(async move {
                        serve::tcp(served, listener).await;
                        Ok(())
                    });
                }
                "--vsock" => {
                    let listener = sys::listen_vsock(AGENT_PORT).map_err(listen_error("vsock"))?;
                    tasks.spawn(async move {
                        serve::vsock(served, listener)
                            .await
                            .map_err(Error::Transport)
                    });
                }
                other => return Err(Error::Usage(format!("{other} is not known"))),
            }
        }
        if tasks.is_empty() {
            return Err(Error::Usage("say where to serve".to_owned()));
        }
        run(&agent, tasks).await
    })
}

struct RemoveSocket(PathBuf);

impl Drop for RemoveSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Reaps children and serves until a shutdown is asked for, by a caller or by a signal.
async fn run(agent: &Arc<Agent>, mut tasks: JoinSet<Result<(), Error>>) -> Result<(), Error> {
    let mut children = signal(SignalKind::child()).map_err(Error::Runtime)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
    loop {
        tokio::select! {
            _ = children.recv() => agent.processes.reap(),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = agent.shutdown.notified() => {
                tokio::time::sleep(FAREWELL).await;
                break;
            }
            Some(ended) = tasks.join_next() => {
                if let Ok(Err(error)) = ended {
                    return Err(error);
                }
            }
        }
    }
    agent.processes.kill_all();
    Ok(())
}
