//! The node: a QEMU process with an emulated CPU that has true virtualisation of its own.

use std::collections::BTreeSet;
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

/// A disk has no smaller parts.
const SECTOR: usize = 512;

/// How often the node is looked after while it says nothing.
const TICK: Duration = Duration::from_secs(5);
/// A node that says nothing for so long, and whose kernel misses a CPU, will say nothing more.
const SILENCE: Duration = Duration::from_secs(45);
/// Nothing in the suite takes so long without a word, on any host: the node hangs without knowing it.
const LONG_SILENCE: Duration = Duration::from_secs(150);

/// What the node's kernel is told.
///
/// QEMU 7.2's VMRUN marks a virtual interrupt in the emulated CPU's word of pending ones without the lock that
/// all others take. What another thread marks there in the same instant is lost: the local APIC holds an
/// interrupt that the CPU is never told of. A kernel that programs each tick by itself, or none while it
/// idles, may then wait for ever. So the ticks are the APIC's own periodic ones, on idle CPUs too
/// (`highres=off nohz=off`): whatever was lost is delivered with the next.
///
/// How fast the emulated TSC goes is measured while the kernel boots, and wrong by a factor where the host is
/// busy meanwhile. Time is the HPET's (`tsc=unstable`).
const COMMAND_LINE: &str = "console=ttyS1 loglevel=5 panic=-1 mitigations=off rdinit=/init \
                            highres=off nohz=off tsc=unstable";

/// Whether the node's kernel complains about a CPU that does not answer.
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

/// What the nodes of a run have said so far.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Exit code of the script, once a node has come to its end.
    pub(crate) code: u8,
    /// The tests on lines that began with `PASS `.
    passed: BTreeSet<String>,
    /// The tests on lines that began with `FAIL `.
    pub(crate) failed: BTreeSet<String>,
}

impl Outcome {
    /// How many tests have passed and never failed.
    pub(crate) fn passed(&self) -> usize {
        self.passed.difference(&self.failed).count()
    }

    /// Takes up a line of the suite, if it is a result: `PASS NAME`, and how long it took in parentheses.
    fn note(&mut self, line: &str) {
        let (results, rest) = if let Some(rest) = line.strip_prefix("PASS ") {
            (&mut self.passed, rest)
        } else if let Some(rest) = line.strip_prefix("FAIL ") {
            (&mut self.failed, rest)
        } else {
            return;
        };
        let name = rest.split(" (").next().unwrap_or(rest);
        results.insert(name.to_owned());
    }

    /// The tests that need not be run again, one a line, as a disk of whole sectors.
    fn disk(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for name in self.passed.union(&self.failed) {
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(b'\n');
        }
        let len = bytes.len().max(1).next_multiple_of(SECTOR);
        bytes.resize(len, 0);
        bytes
    }
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
    /// Boots the node, passes on what the suite prints, and adds what it says to the outcome. The suite leaves
    /// out what the outcome knows already. Files of the run are left in `directory`.
    pub(crate) fn run(&self, directory: &Path, outcome: &mut Outcome) -> Result<(), Error> {
        let log = directory.join("console.log");
        let status = directory.join("status");
        let results = directory.join("results.tar");
        fs::File::create(&results)
            .and_then(|file| file.set_len(RESULTS_BYTES))
            .map_err(CommandError::file(&results))?;
        let known = directory.join("known");
        fs::write(&known, outcome.disk()).map_err(CommandError::file(&known))?;
        let mut child = self.command(&log, &status, &results, &known);
        let mut child = Reaped(child.spawn().map_err(Error::Start)?);
        self.follow(&mut child.0, &log, outcome)?;
        child.0.wait().map_err(Error::Start)?;
        let code = fs::read_to_string(&status)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        outcome.code = code.ok_or(Error::NoResult { log })?;
        Ok(())
    }

    fn follow(&self, child: &mut Child, log: &Path, outcome: &mut Outcome) -> Result<(), Error> {
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
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left.min(TICK)) {
                Ok(line) => {
                    heard = Instant::now();
                    let line = String::from_utf8_lossy(&line);
                    let line = line.trim_end_matches('\r');
                    output::line(line);
                    outcome.note(line);
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
        Ok(())
    }

    fn command(&self, log: &Path, status: &Path, results: &Path, known: &Path) -> Command {
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
            .args(["-append", COMMAND_LINE])
            .args([
                "-chardev",
                "stdio,id=out,signal=off",
                "-serial",
                "chardev:out",
            ]);
        for file in [log, status] {
            qemu.arg("-serial").arg(format!("file:{}", file.display()));
        }
        let disks = [
            (self.root, "on"),
            (self.inputs, "on"),
            (results, "off"),
            (known, "on"),
        ];
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

#[cfg(test)]
mod tests {
    use super::Outcome;

    #[test]
    fn results_are_taken_from_lines_and_known_to_the_next_node() {
        let mut outcome = Outcome::default();
        for line in [
            "PASS forkd-vmm.lab boot::one_cpu_restarts (4 s)",
            "PASS user quickstart (31 s)",
            "FAIL user limits (9 s)",
            "test boot::PASS ... ok",
            "PASS user limits (8 s)",
            "PASS user quickstart (30 s)",
        ] {
            outcome.note(line);
        }
        assert_eq!(outcome.passed(), 2, "what failed once has failed");
        assert!(outcome.failed.iter().eq(["user limits"]));
        let disk = outcome.disk();
        assert_eq!(disk.len(), 512);
        let text = String::from_utf8(disk).unwrap();
        assert_eq!(
            text.trim_end_matches('\0'),
            "forkd-vmm.lab boot::one_cpu_restarts\nuser limits\nuser quickstart\n"
        );
        assert_eq!(Outcome::default().disk(), [0; 512]);
    }
}
