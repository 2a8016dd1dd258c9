//! An engine whose guests are the real agent, each a process of this machine: everything the daemon does to a
//! guest is done to something real, without a VM. It keeps no memory; a fork begins afresh.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use forkd_engine::{
    BootSpec, Capabilities, Engine, Error, Exit, ForkSpec, GuestStream, ProcessIdentity,
    SaveMemory, SaveReport, SaveSpec, Template, TemplateSpec, Vm,
};
use forkd_wire::layer::{Builder, Kind};
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::watch;

/// The agent's program, built once per run of the tests.
fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| {
        let built = std::process::Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "forkd-agent"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(built.unwrap().success(), "the agent was not built");
        // target/debug/deps/it-0123 is this program.
        let own = std::env::current_exe().unwrap();
        let built = own.ancestors().nth(2).unwrap();
        named_as_a_vm(&built.join("forkd-agent"))
    })
}

/// The same program under the name of one that engines run VMs with: those are looked for after a crash.
fn named_as_a_vm(agent: &Path) -> PathBuf {
    let named = agent.with_file_name("test-vms").join("forkd-vmm");
    std::fs::create_dir_all(named.parent().unwrap()).unwrap();
    // Other tests may be starting it right now: it is replaced whole.
    let own = named.with_extension(std::process::id().to_string());
    std::fs::hard_link(agent, &own).unwrap();
    std::fs::rename(&own, &named).unwrap();
    // Where both were the same file already, nothing was renamed.
    let _ = std::fs::remove_file(&own);
    named
}

/// The engine; makes forks fail on request.
#[derive(Debug, Default)]
pub(crate) struct Host {
    /// Every second fork fails while this is set.
    pub(crate) every_second_fails: Arc<AtomicBool>,
    /// A save waits for as long as somebody holds this.
    pub(crate) saves: Arc<tokio::sync::Mutex<()>>,
}

#[async_trait]
impl Engine for Host {
    fn name(&self) -> &'static str {
        "host"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            branch: true,
            branch_writes_behind: false,
            save_layer: true,
            network: false,
            keeps_connections: true,
        }
    }

    async fn compatibility(&self) -> Result<BTreeMap<String, String>, Error> {
        Ok(BTreeMap::new())
    }

    fn difference(
        &self,
        _: &BTreeMap<String, String>,
        _: &BTreeMap<String, String>,
    ) -> Option<String> {
        None
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Vm>, Error> {
        let saves = Arc::clone(&self.saves);
        let guest = Guest::start(&spec.run_dir, spec.machine.memory_mib, saves)?;
        Ok(Arc::new(guest))
    }

    async fn template(&self, spec: TemplateSpec) -> Result<Arc<dyn Template>, Error> {
        Ok(Arc::new(Frozen {
            memory_mib: spec.machine.memory_mib,
            failing: Arc::clone(&self.every_second_fails),
            saves: Arc::clone(&self.saves),
            forks: AtomicUsize::new(0),
        }))
    }

    async fn adopt(
        &self,
        identity: ProcessIdentity,
        _id: &str,
        run_dir: &Path,
    ) -> Result<Option<Arc<dyn Vm>>, Error> {
        if start_ticks(identity.pid) != Some(identity.start_ticks) {
            return Ok(None);
        }
        let (tell, exit) = watch::channel(None);
        tokio::spawn(async move {
            while start_ticks(identity.pid) == Some(identity.start_ticks) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tell.send_replace(Some(Exit::Unknown));
        });
        let guest = Guest {
            identity,
            run_dir: run_dir.to_owned(),
            memory_mib: 64,
            exit,
            saves: Arc::clone(&self.saves),
        };
        Ok(Some(Arc::new(guest)))
    }
}

#[derive(Debug)]
struct Frozen {
    memory_mib: u64,
    failing: Arc<AtomicBool>,
    saves: Arc<tokio::sync::Mutex<()>>,
    forks: AtomicUsize,
}

#[async_trait]
impl Template for Frozen {
    fn identity(&self) -> Option<ProcessIdentity> {
        None
    }

    async fn fork(&self, specs: Vec<ForkSpec>) -> Vec<Result<Arc<dyn Vm>, Error>> {
        let fork = |spec: ForkSpec| {
            let count = self.forks.fetch_add(1, Ordering::Relaxed);
            if self.failing.load(Ordering::Relaxed) && count % 2 == 1 {
                let detail = "told to fail".to_owned();
                return Err(Error::Control {
                    step: "fork",
                    detail,
                });
            }
            let saves = Arc::clone(&self.saves);
            let guest = Guest::start(&spec.run_dir, self.memory_mib, saves)?;
            Ok(Arc::new(guest) as Arc<dyn Vm>)
        };
        specs.into_iter().map(fork).collect()
    }

    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[derive(Debug)]
struct Guest {
    identity: ProcessIdentity,
    run_dir: PathBuf,
    memory_mib: u64,
    exit: watch::Receiver<Option<Exit>>,
    saves: Arc<tokio::sync::Mutex<()>>,
}

fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // A process that is dead but not waited for is gone for everybody else.
    (fields[0] != "Z")
        .then(|| fields[19].parse().ok())
        .flatten()
}

impl Guest {
    fn start(
        run_dir: &Path,
        memory_mib: u64,
        saves: Arc<tokio::sync::Mutex<()>>,
    ) -> Result<Guest, Error> {
        let spawn = |source| Error::Spawn {
            program: "forkd-agent".to_owned(),
            source,
        };
        let console = std::fs::File::create(run_dir.join("console")).map_err(spawn)?;
        std::fs::write(run_dir.join("console"), "the guest boots\n").map_err(spawn)?;
        // In a session of its own: a stopped process whose daemon dies would be hung up on otherwise.
        let mut child = Command::new("setsid")
            .arg(agent())
            .arg("serve")
            .arg("--unix")
            .arg(run_dir.join("agent"))
            .stdin(Stdio::null())
            .stdout(console.try_clone().map_err(spawn)?)
            .stderr(console)
            // With the test's runtime, if the test fails.
            .kill_on_drop(true)
            .spawn()
            .map_err(spawn)?;
        let pid = child.id().unwrap();
        let identity = ProcessIdentity {
            pid,
            start_ticks: start_ticks(pid).unwrap(),
        };
        let (tell, exit) = watch::channel(None);
        tokio::spawn(async move {
            use std::os::unix::process::ExitStatusExt;
            let status = child.wait().await.unwrap();
            let exit = match (status.code(), status.signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            };
            tell.send_replace(Some(exit));
        });
        Ok(Guest {
            identity,
            run_dir: run_dir.to_owned(),
            memory_mib,
            exit,
            saves,
        })
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.identity.pid.cast_signed()).unwrap();
        if start_ticks(self.identity.pid) == Some(self.identity.start_ticks) {
            let _ = kill_process(pid, signal);
        }
    }
}

#[async_trait]
impl Vm for Guest {
    fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    fn console(&self) -> PathBuf {
        self.run_dir.join("console")
    }

    async fn pause(&self) -> Result<(), Error> {
        self.signal(Signal::STOP);
        Ok(())
    }

    async fn resume(&self) -> Result<(), Error> {
        self.signal(Signal::CONT);
        Ok(())
    }

    async fn save(&self, spec: SaveSpec) -> Result<SaveReport, Error> {
        let _turn = self.saves.lock().await;
        let file = |path: &Path, bytes: &[u8]| {
            let step = "write";
            let path = path.to_owned();
            let written = std::fs::write(&path, bytes);
            written.map_err(|source| Error::File { step, path, source })
        };
        let bytes = self.memory_mib << 20;
        let memory = match &spec.memory {
            SaveMemory::Full(memory) => memory,
            SaveMemory::Layer(layer) => {
                let mut index = Builder::new(bytes).unwrap();
                index.push(0, 4096, Kind::Data).unwrap();
                file(&layer.index, &index.finish().encode())?;
                &layer.memory
            }
        };
        file(memory, &[7; 4096])?;
        std::fs::File::options()
            .write(true)
            .open(memory)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        file(&spec.state, b"state")?;
        Ok(SaveReport {
            pause: Duration::from_micros(550),
            memory_bytes: 4096,
        })
    }

    async fn dial(&self) -> Result<Box<dyn GuestStream>, Error> {
        let path = self.run_dir.join("agent");
        let failed = |source: io::Error| Error::File {
            step: "open",
            path: path.clone(),
            source,
        };
        Ok(Box::new(UnixStream::connect(&path).await.map_err(failed)?))
    }

    async fn kill(&self) -> Result<(), Error> {
        self.signal(Signal::KILL);
        self.exited().await;
        Ok(())
    }

    async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await;
        ended
            .ok()
            .and_then(|exit| exit.clone())
            .unwrap_or(Exit::Unknown)
    }
}
