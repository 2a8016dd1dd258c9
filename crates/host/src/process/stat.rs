//! What `/proc` says about a process.

use std::io;

use super::{Error, Identity};

/// What `/proc/<pid>/stat` says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) start_ticks: u64,
    /// Dead, but not reaped.
    pub(super) ended: bool,
}

/// Memory of a process, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident pages, shared ones counted whole.
    pub rss_kib: u64,
    /// Resident pages, shared ones divided by the number of sharers.
    pub pss_kib: u64,
    /// Pages that would be freed if the process ended.
    pub private_kib: u64,
}

/// Pid and start time of a running process; `None` if it is gone.
pub fn identity_of(pid: u32) -> Result<Option<Identity>, Error> {
    let status = status_of(pid)?;
    Ok(status.map(|status| Identity {
        pid,
        start_ticks: status.start_ticks,
    }))
}

/// A process of each user in a range, by the user; those that nobody has are absent.
pub fn by_user(users: std::ops::Range<u32>) -> std::collections::BTreeMap<u32, u32> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((parse_user(&read(pid, "status").ok()??)?, pid)))
        .filter(|(user, _)| users.contains(user))
        .collect()
}

/// The arguments a process was started with; `None` if it is gone. The process can change them.
pub fn command_line(pid: u32) -> Result<Option<Vec<String>>, Error> {
    let Some(text) = read(pid, "cmdline")? else {
        return Ok(None);
    };
    let text = text.strip_suffix('\0').unwrap_or(&text);
    Ok(Some(text.split('\0').map(str::to_owned).collect()))
}

/// Memory that a process uses now. Walks its page tables: milliseconds for a large one.
pub fn memory(pid: u32) -> Result<Memory, Error> {
    let Some(text) = read(pid, "smaps_rollup")? else {
        return Err(Error::Step {
            step: "find",
            pid,
            source: io::ErrorKind::NotFound.into(),
        });
    };
    parse_memory(&text).ok_or(Error::Proc {
        pid,
        file: "smaps_rollup",
    })
}

pub(super) fn status_of(pid: u32) -> Result<Option<Status>, Error> {
    let Some(text) = read(pid, "stat")? else {
        return Ok(None);
    };
    let status = parse_status(&text).ok_or(Error::Proc { pid, file: "stat" })?;
    Ok(Some(status))
}

/// Fields are counted from the last `)`: a program's name may hold spaces and parentheses.
pub(super) fn parse_status(text: &str) -> Option<Status> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    // The state is field 3 of the line, the start time field 22.
    let state = fields.next()?;
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Status {
        start_ticks,
        ended: matches!(state, "Z" | "X" | "x"),
    })
}

/// The real user in `/proc/<pid>/status`.
pub(super) fn parse_user(text: &str) -> Option<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

pub(super) fn parse_memory(text: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(Memory {
        rss_kib: field("Rss:")?,
        pss_kib: field("Pss:")?,
        private_kib: field("Private_Clean:")? + field("Private_Dirty:")?,
    })
}

/// Reads a file of a process; `None` if the process is gone.
fn read(pid: u32, file: &'static str) -> Result<Option<String>, Error> {
    match std::fs::read(format!("/proc/{pid}/{file}")) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
            Ok(None)
        }
        Err(source) => Err(Error::Step {
            step: "read about",
            pid,
            source,
        }),
    }
}
