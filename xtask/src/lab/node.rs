//! The node: a QEMU process with an emulated CPU that has true virtualisation of its own.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::command::Error as CommandError;
use crate::output;

/// Room for what a suite leaves in `/out`.
const RESULTS_BYTES: u64 = 64 << 20;

/// How often the node is looked after while it says nothing.
const TICK: Duration = Duration::from_secs(5);
/// A node that says nothing for so long, and whose kernel misses a CPU, will say nothing more.
const SILENCE: Duration = Duration::from_secs(45);
/// Nothing in the suite takes so long without a word, on any host: the node hangs without knowing it.
const LONG_SILENCE: Duration = Duration::from_secs(150);

/// Whether the node's kernel complains about a CPU that does not answer. QEMU's emulation of nested
/// virtualisation loses one now and then, on a busy host.
fn hangs(log: &Path) -> bool {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.contains("soft lockup") || text.contains("detected stalls")
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("could not start qemu-system-x86_64; install the package qemu-system-x86")]
    Start(#[source] std::io::Error),
    #[error("the node did not finish within {seconds} s; its kernel's log is {log}")]
    TimeLimit { seconds: u64, log: PathBuf },
    #[error("the emulated node hangs; its kernel's log is {log}")]
    Stalled { log: PathBuf },
    #[error("the node ended without a result; its kernel's log is {log}")]
    NoResult { log: PathBuf },
    #[error(transparent)]
    File(#[from] CommandError),
}

/// What the node boots and how large it is.
#[derive(Debug)]
pub(crate) struct Node<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) root: &'a Path,
    pub(crate) inputs: &'a Path,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    pub(crate) limit: Duration,
}

/// What a finished node said.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Exit code of the script.
    pub(crate) code: u8,
    /// Lines that began with `PASS `.
    pub(crate) passed: usize,
    /// What followed `FAIL ` on each line that began with it.
    pub(crate) failed: Vec<String>,
}

/// A child that does not outlive its owner.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Node<'_> {
    /// Boots the node, passes on what the suite prints, and returns how it ended.
    /// Files of the run are left in `directory`.
    pub(crate) fn run(&self, directory: &Path) -> Result<Outcome, Error> {
        let log = directory.join("console.log");
        let status = directory.join("status");
        let results = directory.join("results.tar");
        fs::File::create(&results)
            .and_then(|file| file.set_len(RESULTS_BYTES))
            .map_err(CommandError::file(&results))?;
        let mut child = self.command(&log, &status, &results);
        let mut child = Reaped(child.spawn().map_err(Error::Start)?);
        let mut outcome = self.follow(&mut child.0, &log)?;
        child.0.wait().map_err(Error::Start)?;
        let code = fs::read_to_string(&status)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        outcome.code = code.ok_or(Error::NoResult { log })?;
        Ok(outcome)
    }

    fn follow(&self, child: &mut Child, log: &Path) -> Result<Outcome, Error> {
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, lines) = channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let deadline = Instant::now() + self.limit;
        let mut heard = Instant::now();
        let mut outcome = Outcome::default();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left.min(TICK)) {
                Ok(line) => {
                    heard = Instant::now();
                    let line = String::from_utf8_lossy(&line);
                    let line = line.trim_end_matches('\r');
                    output::line(line);
                    if line.starts_with("PASS ") {
                        outcome.passed += 1;
                    } else if let Some(name) = line.strip_prefix("FAIL ") {
                        outcome.failed.push(name.to_owned());
                    }
                }
                Err(RecvTimeoutError::Timeout) if !left.is_zero() => {
                    let silent = heard.elapsed();
                    if silent > LONG_SILENCE || (silent > SILENCE && hangs(log)) {
                        let log = log.to_owned();
                        return Err(Error::Stalled { log });
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = self.limit.as_secs();
                    return Err(Error::TimeLimit {
                        seconds,
                        log: log.to_owned(),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        reader.join().ok();
        Ok(outcome)
    }

    fn command(&self, log: &Path, status: &Path, results: &Path) -> Command {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-M", "q35"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max"])
            .args([
                "-m",
                &format!("{}M", self.memory_mib),
                "-smp",
                &self.cpus.to_string(),
            ])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .args([
                "-append",
                "console=ttyS1 loglevel=5 panic=-1 mitigations=off rdinit=/init",
            ])
            .args([
                "-chardev",
                "stdio,id=out,signal=off",
                "-serial",
                "chardev:out",
            ]);
        for file in [log, status] {
            qemu.arg("-serial").arg(format!("file:{}", file.display()));
        }
        let disks = [(self.root, "on"), (self.inputs, "on"), (results, "off")];
        for (index, (path, read_only)) in disks.into_iter().enumerate() {
            let path = path.display();
            qemu.arg("-drive")
                .arg(format!(
                    "if=none,id=d{index},file={path},format=raw,readonly={read_only}"
                ))
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=d{index}"));
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        qemu
    }
}
