//! Messages of the process service (E2B's `process.Process`, Connect JSON).
//!
//! Fields that E2B's service does not have are marked *extension*; all of them are optional, so
//! that its clients are served as they expect.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bytes64;

/// Unary: [`ListRequest`] to [`ListResponse`].
pub const LIST_PATH: &str = "/process.Process/List";
/// Server stream: [`StartRequest`] to [`EventResponse`].
pub const START_PATH: &str = "/process.Process/Start";
/// Server stream: [`SelectRequest`] to [`EventResponse`].
pub const CONNECT_PATH: &str = "/process.Process/Connect";
/// Unary: [`UpdateRequest`] to `{}`.
pub const UPDATE_PATH: &str = "/process.Process/Update";
/// Client stream: [`StreamInputRequest`] to `{}`.
pub const STREAM_INPUT_PATH: &str = "/process.Process/StreamInput";
/// Unary: [`SendInputRequest`] to `{}`.
pub const SEND_INPUT_PATH: &str = "/process.Process/SendInput";
/// Unary: [`SendSignalRequest`] to `{}`.
pub const SEND_SIGNAL_PATH: &str = "/process.Process/SendSignal";
/// Unary: [`SelectRequest`] to `{}`.
pub const CLOSE_STDIN_PATH: &str = "/process.Process/CloseStdin";

/// A terminal to run the process on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// Its size, 80 by 24 if absent.
    #[serde(default)]
    pub size: PtySize,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtySize {
    /// Columns.
    #[serde(default)]
    pub cols: u16,
    /// Rows.
    #[serde(default)]
    pub rows: u16,
}

impl Default for PtySize {
    fn default() -> Self {
        Self { cols: 80, rows: 24 }
    }
}

/// What to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessConfig {
    /// The program: a path, or a name looked up in `PATH`.
    pub cmd: String,
    /// Its arguments, without the program itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment over the guest's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub envs: BTreeMap<String, String>,
    /// Working directory; the user's home if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
}

/// Starts a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartRequest {
    /// What to run.
    pub process: ProcessConfig,
    /// Run on a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pty: Option<Pty>,
    /// A name to find the process by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Whether standard input is a pipe that stays open; otherwise it is empty. Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<bool>,
    /// *Extension.* Milliseconds after which the process group is killed; 0 is no limit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub timeout_ms: u64,
    /// *Extension.* Kill the process group when the caller cancels this stream. A *lost connection*
    /// never kills: forks of a running sandbox begin with one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kill_on_cancel: bool,
    /// *Extension.* The user to run as, before the one of the `Authorization` header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Names a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProcessSelector {
    /// By process id.
    Pid(u32),
    /// By the tag it was started with.
    Tag(String),
}

/// The request of `Connect` and `CloseStdin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectRequest {
    /// Which process.
    pub process: ProcessSelector,
}

/// Asks for all processes the agent started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListRequest {}

/// All processes the agent started that still run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListResponse {
    /// In order of process id.
    #[serde(default)]
    pub processes: Vec<ProcessInfo>,
}

/// One running process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// What was asked for.
    pub config: ProcessConfig,
    /// Process id, also the process group's.
    pub pid: u32,
    /// Its tag, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// Changes a running process's terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateRequest {
    /// Which process.
    pub process: ProcessSelector,
    /// The terminal's new size.
    #[serde(default)]
    pub pty: Option<Pty>,
}

/// One message of the `Start` and `Connect` streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventResponse {
    /// What happened.
    pub event: ProcessEvent,
}

/// What happened to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProcessEvent {
    /// It runs; always first.
    Start(StartEvent),
    /// It wrote something.
    Data(DataEvent),
    /// It is over; always last.
    End(EndEvent),
    /// Nothing; keeps the stream alive.
    Keepalive(KeepAlive),
}

/// The process runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartEvent {
    /// Process id.
    #[serde(default)]
    pub pid: u32,
}

/// The process wrote something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DataEvent {
    /// To standard output.
    Stdout(#[serde(with = "bytes64")] Vec<u8>),
    /// To standard error.
    Stderr(#[serde(with = "bytes64")] Vec<u8>),
    /// To its terminal.
    Pty(#[serde(with = "bytes64")] Vec<u8>),
}

/// The process is over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndEvent {
    /// Its exit status; -1 when a signal ended it.
    #[serde(default)]
    pub exit_code: i32,
    /// Whether it left by itself.
    #[serde(default)]
    pub exited: bool,
    /// In words, such as `exit status 1` or `signal: killed`.
    #[serde(default)]
    pub status: String,
    /// What went wrong, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// *Extension.* The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// *Extension.* Its time was up and the agent killed it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
}

/// An empty message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepAlive {}

/// Bytes for a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProcessInput {
    /// For its standard input.
    Stdin(#[serde(with = "bytes64")] Vec<u8>),
    /// For its terminal.
    Pty(#[serde(with = "bytes64")] Vec<u8>),
}

/// Writes to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendInputRequest {
    /// Which process.
    pub process: ProcessSelector,
    /// What to write.
    pub input: ProcessInput,
}

/// One message of the `StreamInput` stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamInputRequest {
    /// Names the process first, then carries input.
    pub event: InputEvent,
}

/// What a message of the `StreamInput` stream is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum InputEvent {
    /// Which process; always first.
    Start(SelectRequest),
    /// Bytes for it.
    Data(InputData),
    /// Nothing.
    Keepalive(KeepAlive),
}

/// Bytes for the process named first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputData {
    /// The bytes.
    pub input: ProcessInput,
}

/// Sends a signal to a process's group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSignalRequest {
    /// Which process.
    pub process: ProcessSelector,
    /// Which signal.
    pub signal: Signal,
}

/// A signal's number. Written as a number, or as E2B's enum for the two it knows; read as a number
/// or as a name such as `SIGNAL_SIGTERM` or `SIGTERM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal(pub i32);

/// Names of signals by number, from 1.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

impl Signal {
    /// The signal of a name such as `SIGTERM`, `TERM` or `SIGNAL_SIGTERM`.
    pub fn from_name(name: &str) -> Option<Self> {
        let short = name.strip_prefix("SIGNAL_").unwrap_or(name);
        let short = short.strip_prefix("SIG").unwrap_or(short);
        let at = SIGNALS.iter().position(|known| *known == short)?;
        i32::try_from(at + 1).ok().map(Self)
    }

    /// The signal's name, such as `SIGTERM`.
    pub fn name(self) -> Option<String> {
        let at = usize::try_from(self.0).ok()?.checked_sub(1)?;
        SIGNALS.get(at).map(|short| format!("SIG{short}"))
    }
}

impl Serialize for Signal {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            9 => serializer.serialize_str("SIGNAL_SIGKILL"),
            15 => serializer.serialize_str("SIGNAL_SIGTERM"),
            number => serializer.serialize_i32(number),
        }
    }
}

impl<'de> Deserialize<'de> for Signal {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(i32),
            Name(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number @ 1..=64) => Ok(Self(number)),
            Form::Number(number) => Err(serde::de::Error::custom(format!(
                "{number} is no signal; use 1 to 64"
            ))),
            Form::Name(name) => Self::from_name(&name)
                .ok_or_else(|| serde::de::Error::custom(format!("{name:?} is no signal's name"))),
        }
    }
}

#[cfg(test)]
mod tests;
