//! Programs on PATH, and which version they say they are.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::parse;

/// A program that does not say its version by then is not asked further.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a program is looked at.
const TICK: Duration = Duration::from_millis(2);
/// A version is within the first bytes; also less than a pipe holds, so nobody blocks.
const OUTPUT_MAX: u64 = 16 * 1024;

/// A program that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    /// Where.
    pub path: PathBuf,
    /// Its version, such as `7.2.22`, when it could be learnt.
    pub version: Option<String>,
}

/// Finds a program on PATH and runs it to learn its version; `ask` is the option for that, such as
/// `--version`.
pub fn find_tool(name: &str, ask: &str) -> Option<Tool> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = find(name, &path)?;
    let version = run(&path, ask).and_then(|text| parse::version(&text));
    Some(Tool { path, version })
}

/// The first executable file of this name in the directories of a PATH.
pub(super) fn find(name: &str, path: &OsStr) -> Option<PathBuf> {
    let candidates = std::env::split_paths(path).map(|dir| dir.join(name));
    let is_program = |path: &PathBuf| {
        let metadata = path.metadata();
        metadata.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    candidates.into_iter().find(is_program)
}

/// The beginning of what a program prints, on either stream: some print their version as an error.
fn run(path: &Path, ask: &str) -> Option<String> {
    let mut command = Command::new(path);
    command.arg(ask).env("LC_ALL", "C").stdin(Stdio::null());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    wait(&mut child);
    let mut text = String::new();
    let stdout = child
        .stdout
        .take()
        .map(|out| out.take(OUTPUT_MAX).read_to_string(&mut text));
    if !matches!(stdout, Some(Ok(1..))) {
        let _not_text = child
            .stderr
            .take()?
            .take(OUTPUT_MAX)
            .read_to_string(&mut text);
    }
    Some(text)
}

/// Waits for the end, or makes it.
fn wait(child: &mut Child) {
    let end = Instant::now() + PATIENCE;
    while let Ok(None) = child.try_wait() {
        if Instant::now() >= end {
            // Both fail only where the child is gone already.
            let _gone = child.kill();
            let _reaped = child.wait();
            return;
        }
        thread::sleep(TICK);
    }
}
