//! One agent with a directory of its own, and clients for it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use forkd_engine::{Error as EngineError, GuestStream};
use forkd_sandbox::guest::{Client, Dial};
use tempfile::TempDir;
use tokio::net::UnixStream;

/// Longer than anything takes that works.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Dials the agent's socket, framed or plain.
#[derive(Debug)]
pub(crate) struct SocketDial {
    pub(crate) path: PathBuf,
    pub(crate) framed: bool,
    pub(crate) dialled: AtomicUsize,
}

#[async_trait]
impl Dial for SocketDial {
    async fn dial(&self) -> Result<Box<dyn GuestStream>, EngineError> {
        self.dialled.fetch_add(1, Ordering::Relaxed);
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| EngineError::File {
                step: "connect to",
                path: self.path.clone(),
                source,
            })?;
        Ok(if self.framed {
            Box::new(forkd_engine::link::connect(stream))
        } else {
            Box::new(stream)
        })
    }
}

pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) agent: Child,
    pub(crate) client: Client,
    pub(crate) dial: Arc<SocketDial>,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(false, &[]).await
    }

    pub(crate) async fn framed() -> Self {
        Self::with(true, &[]).await
    }

    pub(crate) async fn with(framed: bool, env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let agent = Command::new(env!("CARGO_BIN_EXE_forkd-agent"))
            .args(["serve", if framed { "--link" } else { "--unix" }])
            .arg(&path)
            .envs(env.iter().copied())
            .env("HOME", dir.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let dial = Arc::new(SocketDial {
            path,
            framed,
            dialled: AtomicUsize::new(0),
        });
        let client = Client::with_dial(Arc::clone(&dial) as Arc<dyn Dial>);
        client.health(PATIENCE).await.unwrap();
        Self {
            dir,
            agent,
            client,
            dial,
        }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// The agent's resident memory, bytes.
    pub(crate) fn agent_memory(&self) -> u64 {
        memory(self.agent.id(), "VmRSS:")
    }

    /// The most it ever had.
    pub(crate) fn agent_peak(&self) -> u64 {
        memory(self.agent.id(), "VmHWM:")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn memory(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Waits until `done`, and fails after a while.
pub(crate) async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(tokio::time::Instant::now() < end, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether a process runs.
pub(crate) fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with('Z')
    })
}
