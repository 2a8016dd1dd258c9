//! A daemon of its own for the measurement.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::{Answer, Client};

const PROGRAM: &str = env!("CARGO_BIN_EXE_forkd-controller");

/// The program, ended with the value, its sandboxes with it.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    /// Where it listens.
    pub(crate) addr: SocketAddr,
    /// Where it keeps things.
    pub(crate) dir: TempDir,
    /// Sockets and consoles of running VMs; in memory, as /run is.
    pub(crate) run: TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// Starts it with this engine and waits until it serves.
    pub(crate) fn start(engine: &str) -> io::Result<Daemon> {
        let dir = TempDir::new()?;
        let run = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new())?;
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let path = |name: &str| dir.path().join(name);
        let child = Command::new(PROGRAM)
            .args(["serve", "--engine", engine, "--on-exit", "kill"])
            .args(["--bind", &addr.to_string()])
            .arg("--data-dir")
            .arg(path("data"))
            .arg("--run-dir")
            .arg(run.path())
            .arg("--audit-log")
            .arg(path("audit.log"))
            .env_remove("FORKD_TOKEN_FILE")
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(path("log"))?)
            .spawn()?;
        let daemon = Daemon {
            child,
            addr,
            dir,
            run,
        };
        let begun = Instant::now();
        loop {
            match daemon
                .client()
                .and_then(|mut c| c.ask("GET", "/readyz", ""))
            {
                Ok(answer) if answer.status == 200 => return Ok(daemon),
                _ if begun.elapsed() > Duration::from_secs(60) => {
                    let log = std::fs::read_to_string(daemon.dir.path().join("log"))?;
                    return Err(io::Error::other(format!("does not serve: {log}")));
                }
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A new connection.
    pub(crate) fn client(&self) -> io::Result<Client> {
        Client::connect(self.addr)
    }

    /// Asks on a new connection; any status but that one is an error.
    pub(crate) fn expect(
        &self,
        status: u16,
        method: &str,
        path: &str,
        body: &str,
    ) -> io::Result<Answer> {
        let answer = self.client()?.ask(method, path, body)?;
        if answer.status != status {
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            return Err(io::Error::other(format!("{method} {path}: {text}")));
        }
        Ok(answer)
    }

    /// Makes the snapshot `base` of the guest in a directory, or of files that say nothing.
    pub(crate) fn snapshot(&self, guest: Option<&Path>, memory_mib: u64) -> io::Result<()> {
        let file = |name: &str| -> io::Result<PathBuf> {
            let own = self.dir.path().join(name);
            match guest {
                Some(guest) => Ok(guest.join(name)),
                None => std::fs::write(&own, name).map(|()| own),
            }
        };
        let body = json!({
            "tag": "base", "kernel": file("kernel")?, "initramfs": file("initramfs")?,
            "rootfs": file("rootfs")?, "memory_mib": memory_mib,
        });
        self.expect(201, "POST", "/v1/snapshots", &body.to_string())?;
        Ok(())
    }

    /// Forks `base`; answers the ids and the answer itself.
    pub(crate) fn fork(&self, n: u32) -> io::Result<(Vec<String>, Answer)> {
        let body = json!({"snapshot_tag": "base", "n": n}).to_string();
        let answer = self.expect(201, "POST", "/v1/sandboxes", &body)?;
        let made: Vec<Value> = serde_json::from_slice(&answer.body)?;
        let id = |sandbox: &Value| sandbox["id"].as_str().unwrap_or_default().to_owned();
        Ok((made.iter().map(id).collect(), answer))
    }

    /// Kills these sandboxes.
    pub(crate) fn kill(&self, ids: &[String]) -> io::Result<()> {
        let mut client = self.client()?;
        for id in ids {
            client.ask("DELETE", &format!("/v1/sandboxes/{id}"), "")?;
        }
        Ok(())
    }

    /// Its resident memory, KiB.
    pub(crate) fn resident_kib(&self) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
        number.ok_or_else(|| io::Error::other("no VmRSS"))
    }
}
