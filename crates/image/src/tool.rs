//! Runs the programs a build relies on: found first, watched while they run, gone when we are.
//!
//! A tool runs in its own process group and, where the kernel allows it, in its own process and
//! mount namespaces. When it is cancelled, when it runs out of time or when this process is
//! killed, its whole tree dies and its mounts vanish with it.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use crate::Progress;

mod confine;
mod output;

use output::{Tail, read_lines};

/// How often a running tool's caller is asked whether to go on.
const POLL: Duration = Duration::from_millis(100);
/// The longest any tool may take: a mirror that trickles must not hold a build forever.
const RUN_MAX: Duration = Duration::from_secs(45 * 60);
/// After the tool's end, how long its output may stay open (a stray descendant may hold it).
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Captured output larger than this is no answer to any of our questions.
const CAPTURE_MAX: u64 = 4 * 1024 * 1024;

/// A program and the Debian package that brings it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Its name on PATH.
    pub program: &'static str,
    /// The package to install when it is missing.
    pub package: &'static str,
    /// What it finds in its environment besides ours.
    pub env: &'static [(&'static str, &'static str)],
}

/// Makes a Debian root file system.
pub const MMDEBSTRAP: Tool = Tool::new("mmdebstrap", "mmdebstrap");
/// Packs a root file system. It dates the image, and all files younger than that, by this variable:
/// the year 2100 makes the image's own date constant and leaves the files' alone.
pub const MKFS_EROFS: Tool = Tool {
    env: &[("SOURCE_DATE_EPOCH", "4102444800")],
    ..Tool::new("mkfs.erofs", "erofs-utils")
};
/// Unpacks a Debian package.
pub const DPKG_DEB: Tool = Tool::new("dpkg-deb", "dpkg");
/// Downloads Debian packages.
pub const APT_GET: Tool = Tool::new("apt-get", "apt");
/// Asks which packages exist.
pub const APT_CACHE: Tool = Tool::new("apt-cache", "apt");
/// Decompresses kernel modules on distributions that compress them.
pub const XZ: Tool = Tool::new("xz", "xz-utils");

/// A tool is missing or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not on PATH.
    #[error("`{program}` is not on PATH; install it with: apt-get install {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// The package that brings it.
        package: &'static str,
    },
    /// Could not be started.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Ended with a failure.
    #[error("{program} failed ({status}){}", shown(tail))]
    Failed {
        /// The program.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// Its last lines of output.
        tail: Vec<String>,
    },
    /// Took too long.
    #[error("{program} was stopped after {} minutes{}", RUN_MAX.as_secs() / 60, shown(tail))]
    TimedOut {
        /// The program.
        program: &'static str,
        /// Its last lines of output.
        tail: Vec<String>,
    },
    /// The caller asked to stop.
    #[error("{program} was stopped on request")]
    Cancelled {
        /// The program.
        program: &'static str,
    },
}

fn shown(tail: &[String]) -> String {
    let indented: Vec<String> = tail.iter().map(|line| format!("\n  {line}")).collect();
    if indented.is_empty() {
        String::new()
    } else {
        format!("; it said:{}", indented.concat())
    }
}

impl Tool {
    /// A program and its package.
    pub const fn new(program: &'static str, package: &'static str) -> Tool {
        Tool {
            program,
            package,
            env: &[],
        }
    }

    /// Where the program is.
    pub fn find(&self) -> Result<PathBuf, Error> {
        find_in(self.program, std::env::var_os("PATH").as_deref()).ok_or(Error::Missing {
            program: self.program,
            package: self.package,
        })
    }

    /// Runs the tool in a directory, to its end. Each line of its output, both streams, goes to
    /// `line`.
    pub fn run<I, S>(
        &self,
        dir: &Path,
        args: I,
        progress: &mut dyn Progress,
        line: &mut dyn FnMut(&str, &mut dyn Progress),
    ) -> Result<(), Error>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let spawn_failed = |source| Error::Spawn {
            program: self.program,
            source,
        };
        let (reader, writer) = io::pipe().map_err(spawn_failed)?;
        let mut command = confine::confined(&self.find()?);
        command
            .args(args)
            .current_dir(dir)
            .envs(self.env.iter().copied())
            .stdin(Stdio::null());
        command
            .stdout(writer.try_clone().map_err(spawn_failed)?)
            .stderr(writer);
        let mut running = Running {
            child: command.spawn().map_err(spawn_failed)?,
            over: false,
        };
        // The command still holds the pipe's write end; the reader would never see its end.
        drop(command);
        let (sender, lines) = sync_channel(64);
        std::thread::spawn(move || read_lines(reader, &mut |line| sender.send(line).is_ok()));
        self.watch(&mut running, &lines, progress, line)
    }

    fn watch(
        &self,
        running: &mut Running,
        lines: &Receiver<String>,
        progress: &mut dyn Progress,
        line: &mut dyn FnMut(&str, &mut dyn Progress),
    ) -> Result<(), Error> {
        let program = self.program;
        let mut tail = Tail::default();
        let deadline = Instant::now() + RUN_MAX;
        let mut ended: Option<(ExitStatus, Instant)> = None;
        loop {
            let received = lines.recv_timeout(POLL);
            let output_ended = received == Err(RecvTimeoutError::Disconnected);
            if let Ok(text) = received {
                line(&text, progress);
                tail.push(text);
            }
            if ended.is_none() {
                ended = running
                    .try_wait()
                    .map_err(|source| Error::Spawn { program, source })?;
            }
            match ended {
                Some((status, at)) if output_ended || at.elapsed() > DRAIN_MAX => {
                    if status.success() {
                        return Ok(());
                    }
                    return Err(Error::Failed {
                        program,
                        status,
                        tail: tail.into(),
                    });
                }
                Some(_) => {}
                None if progress.cancelled() => return Err(Error::Cancelled { program }),
                None if Instant::now() > deadline => {
                    return Err(Error::TimedOut {
                        program,
                        tail: tail.into(),
                    });
                }
                // The output is over, so the tool is about to be; `recv` no longer waits for us.
                None if output_ended => std::thread::sleep(Duration::from_millis(2)),
                None => {}
            }
        }
    }

    /// Runs a tool that answers at once and gives its standard output as text.
    pub fn output<I, S>(&self, args: I) -> Result<String, Error>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let bytes = self.bytes(args, CAPTURE_MAX)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs a tool that answers at once and gives its standard output, at most `max` bytes.
    pub fn bytes<I, S>(&self, args: I, max: u64) -> Result<Vec<u8>, Error>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let program = self.program;
        let failed = |source| Error::Spawn { program, source };
        let mut command = confine::alone(&self.find()?);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = Running {
            child: command.spawn().map_err(failed)?,
            over: false,
        };
        let stderr = running.child.stderr.take();
        let said = std::thread::spawn(move || {
            let mut tail = Tail::default();
            if let Some(stderr) = stderr {
                read_lines(stderr, &mut |line| {
                    tail.push(line);
                    true
                });
            }
            tail
        });
        let mut bytes = Vec::new();
        if let Some(stdout) = running.child.stdout.take() {
            stdout
                .take(max + 1)
                .read_to_end(&mut bytes)
                .map_err(failed)?;
        }
        if bytes.len() as u64 > max {
            return Err(failed(io::Error::other("it answered more than it should")));
        }
        let tail = said.join().unwrap_or_default().into();
        let status = running.child.wait().map_err(failed)?;
        running.over = true;
        if status.success() {
            Ok(bytes)
        } else {
            Err(Error::Failed {
                program,
                status,
                tail,
            })
        }
    }
}

/// A child that does not outlive its guard.
struct Running {
    child: Child,
    over: bool,
}

impl Running {
    fn try_wait(&mut self) -> io::Result<Option<(ExitStatus, Instant)>> {
        let status = self.child.try_wait()?;
        self.over = status.is_some();
        Ok(status.map(|status| (status, Instant::now())))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // It leads its own group (`process_group(0)`) and is not yet reaped, so the id is its.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn find_in(program: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    let path = path.unwrap_or_default();
    // Services and sudo often run without the administrator's directories.
    let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .chain(extra)
        .map(|dir| dir.join(program))
        .find(|file| {
            file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
        })
}

#[cfg(test)]
mod tests;
