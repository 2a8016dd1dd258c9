//! The comparison: Firecracker restores a guest of the same size in the same minutes, where its program is
//! on PATH.
//!
//! Its guest is a few bytes of machine code. The snapshot is taken while they wait; with one byte changed in the
//! snapshot's memory a restored guest says a word on its serial line at once, and halts. As with ours, the time
//! ends when the guest's own word is heard.
//!
//! ```text
//!   once    boot-source, machine-config, InstanceStart, Paused, snapshot/create
//!   N times start the program, wait for its socket, snapshot/load with resume, hear the guest
//! ```

mod api;
mod kernel;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::json;

use super::figures::private_kib;
use api::Connection;

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Single restores in a round.
const SINGLES: usize = 4;

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The program is not there.
    #[error("no firecracker on PATH: install it, or put its directory on PATH")]
    Absent,
    /// The program does not start, or a file cannot be written.
    #[error("cannot {step}")]
    System {
        /// The step.
        step: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It does not open its socket.
    #[error("firecracker does not open its socket: run it by hand to see why")]
    Silent,
    /// It ended before its guest said anything, or its guest says nothing.
    #[error("nothing is heard of firecracker's guest: run it by hand to see why")]
    Mute,
    /// Its socket said no.
    #[error("firecracker refuses {path}")]
    Api {
        /// The request.
        path: &'static str,
        /// Why.
        #[source]
        source: api::Error,
    },
}

fn system(step: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::System { step, source }
}

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// What the program says it is.
    pub(super) version: String,
    /// One restore, milliseconds.
    pub(super) one: Vec<f64>,
    /// A hundred restores, milliseconds.
    pub(super) hundred: Vec<f64>,
    /// Private memory of a restored machine, KiB.
    pub(super) private_kib: Vec<f64>,
}

/// A snapshot that Firecracker has made of its own guest.
#[derive(Debug)]
pub(super) struct Firecracker {
    program: PathBuf,
    directory: PathBuf,
    state: PathBuf,
    memory: PathBuf,
    started: usize,
}

/// The program, if it is on PATH.
pub(super) fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join("firecracker"))
        .find(|candidate| candidate.is_file())
}

impl Firecracker {
    /// Boots the guest once and has it written to `directory`.
    pub(super) fn set_up(directory: &Path, memory_mib: u32) -> Result<Firecracker, Error> {
        let program = program().ok_or(Error::Absent)?;
        let mut this = Firecracker {
            program,
            state: directory.join("firecracker.state"),
            memory: directory.join("firecracker.memory"),
            directory: directory.to_owned(),
            started: 0,
        };
        let image = directory.join("firecracker.kernel");
        std::fs::write(&image, kernel::image()).map_err(system("write a kernel"))?;
        let machine = this.start()?;
        let mut api = machine.connect()?;
        let requests = [
            ("PUT", "/boot-source", json!({"kernel_image_path": image})),
            (
                "PUT",
                "/machine-config",
                json!({"vcpu_count": 1, "mem_size_mib": memory_mib}),
            ),
            ("PUT", "/actions", json!({"action_type": "InstanceStart"})),
            ("PATCH", "/vm", json!({"state": "Paused"})),
            (
                "PUT",
                "/snapshot/create",
                json!({"snapshot_type": "Full", "snapshot_path": this.state, "mem_file_path": this.memory}),
            ),
        ];
        for (method, path, body) in requests {
            ask(&mut api, method, path, &body)?;
        }
        let memory = File::options().write(true).open(&this.memory);
        memory
            .and_then(|memory| memory.write_all_at(&[1], kernel::GO_OFFSET))
            .map_err(system("change the guest's memory"))?;
        Ok(this)
    }

    /// What the program says it is.
    pub(super) fn version(&self) -> String {
        let output = Command::new(&self.program).arg("--version").output();
        let text = output.map(|output| output.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().next().unwrap_or_default().trim().to_owned()
    }

    /// One round, beside a round of our own.
    pub(super) fn round(&mut self, samples: &mut Samples) -> Result<(), Error> {
        for _ in 0..SINGLES {
            samples.one.push(self.restore(1)?.0);
        }
        let (wall, kib) = self.restore(100)?;
        samples.hundred.push(wall);
        samples.private_kib.extend(kib);
        Ok(())
    }

    /// Restores `count` machines; milliseconds until all run, and private memory of some.
    fn restore(&mut self, count: usize) -> Result<(f64, Vec<f64>), Error> {
        const LOAD: &str = "/snapshot/load";
        let body = json!({
            "snapshot_path": self.state,
            "mem_backend": {"backend_type": "File", "backend_path": self.memory},
            "resume_vm": true,
        });
        let start = Instant::now();
        let mut machines: Vec<Machine> =
            (0..count).map(|_| self.start()).collect::<Result<_, _>>()?;
        let mut connections = Vec::with_capacity(count);
        for machine in &machines {
            let mut api = machine.connect()?;
            api.send("PUT", LOAD, &body).map_err(refused(LOAD))?;
            connections.push(api);
        }
        for api in &mut connections {
            api.answer().map_err(refused(LOAD))?;
        }
        machines.iter_mut().try_for_each(Machine::hear)?;
        let took = start.elapsed().as_secs_f64() * 1000.0;
        let sample = machines.iter().step_by(10);
        let kib = sample
            .filter_map(|machine| private_kib(machine.child.id()))
            .collect();
        Ok((took, kib))
    }

    fn start(&mut self) -> Result<Machine, Error> {
        self.started += 1;
        let socket = self.directory.join(format!("fc-{}.sock", self.started));
        let child = Command::new(&self.program)
            .arg("--api-sock")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(system("start firecracker"))?;
        Ok(Machine { child, socket })
    }
}

fn refused(path: &'static str) -> impl Fn(api::Error) -> Error {
    move |source| Error::Api { path, source }
}

fn ask(
    api: &mut Connection,
    method: &'static str,
    path: &'static str,
    body: &serde_json::Value,
) -> Result<(), Error> {
    api.send(method, path, body)
        .and_then(|()| api.answer())
        .map_err(refused(path))
}

/// A running program, ended when it goes out of scope.
#[derive(Debug)]
struct Machine {
    child: Child,
    socket: PathBuf,
}

impl Machine {
    /// Waits for the socket, which the program opens some time after it was started.
    fn connect(&self) -> Result<Connection, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Connection::open(&self.socket, PATIENCE) {
                Ok(connection) => return Ok(connection),
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(_) => return Err(Error::Silent),
            }
        }
    }

    /// Waits for the guest's word among what the program itself says.
    fn hear(&mut self) -> Result<(), Error> {
        let output = self.child.stdout.as_mut().ok_or(Error::Mute)?;
        let deadline = Instant::now() + PATIENCE;
        let mut heard = [0; 256];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("it is less than PATIENCE");
            let mut waiting = [PollFd::new(output, PollFlags::IN)];
            let ready = rustix::event::poll(&mut waiting, Some(&left));
            if ready.map_err(|e| system("hear the guest")(e.into()))? == 0 {
                return Err(Error::Mute);
            }
            match output.read(&mut heard).map_err(system("hear the guest"))? {
                0 => return Err(Error::Mute),
                len if heard[..len].contains(&kernel::WORD) => return Ok(()),
                _ => {}
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
        _ = std::fs::remove_file(&self.socket);
    }
}

#[cfg(test)]
mod tests;
