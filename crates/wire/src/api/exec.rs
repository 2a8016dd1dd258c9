//! Running things in a sandbox.
//!
//! Three ways to run a command: `exec` answers once with everything, `exec/stream` streams server-sent
//! events, `exec/ws` is a WebSocket that also takes standard input and signals.
//!
//! On the WebSocket, text frames are JSON ([`ClientMessage`] one way, [`ServerMessage`] the other)
//! and binary frames are data: the first byte names the stream ([`STDIN`], [`STDOUT`], [`STDERR`]), the rest is
//! the data. The client's first frame is `start`; the daemon's last is `exit` or `error`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::ErrorBody;

/// First byte of a binary frame with standard input.
pub const STDIN: u8 = 0;
/// First byte of a binary frame with standard output.
pub const STDOUT: u8 = 1;
/// First byte of a binary frame with standard error.
pub const STDERR: u8 = 2;

/// Exit code reported for a command that ran out of time, as `timeout(1)` does.
pub const EXIT_TIMED_OUT: i64 = 124;
/// Exit code reported for a command that may not be run, as shells do.
pub const EXIT_NOT_ALLOWED: i64 = 126;
/// Exit code reported for a command that is not there, as shells do.
pub const EXIT_NOT_FOUND: i64 = 127;

/// Body of `POST /v1/sandboxes/{id}/exec`, of `exec/stream`, and of the `start` frame on `exec/ws`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Exec {
    /// The program and its arguments. No shell is involved.
    #[cfg_attr(feature = "openapi", schema(min_items = 1))]
    pub args: Vec<String>,
    /// Seconds after which the command is killed; 0 is no limit.
    #[serde(default = "default_timeout_secs")]
    pub timeout_secs: u64,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment, over that of the sandbox.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// User name or number; root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Standard input as text. Not on `exec/ws`, which streams it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
}

impl Exec {
    /// A command with the defaults for everything else.
    pub fn new<S: Into<String>>(args: impl IntoIterator<Item = S>) -> Self {
        Self {
            args: args.into_iter().map(Into::into).collect(),
            timeout_secs: default_timeout_secs(),
            cwd: None,
            env: BTreeMap::new(),
            user: None,
            stdin: None,
        }
    }
}

fn default_timeout_secs() -> u64 {
    30
}

/// Answer of `POST /v1/sandboxes/{id}/exec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecResult {
    /// Standard output; bytes that are no UTF-8 are replaced.
    pub stdout: String,
    /// Standard error; bytes that are no UTF-8 are replaced.
    pub stderr: String,
    /// The exit code; 128 plus the signal's number for a command that a signal ended,
    /// [`EXIT_TIMED_OUT`], [`EXIT_NOT_ALLOWED`] or [`EXIT_NOT_FOUND`].
    pub exit_code: i64,
    /// Why the command did not start or did not finish.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether the command was killed because its time was up.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub timed_out: bool,
    /// Whether output was cut; stream it to get all.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub truncated: bool,
}

/// How a streamed command ended: the event `exit` of `exec/stream`, and a frame of `exec/ws`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecExit {
    /// As in [`ExecResult::exit_code`].
    pub exit_code: i64,
    /// Why the command did not start or did not finish.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether the command was killed because its time was up.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub timed_out: bool,
}

/// The event `started` of `exec/stream`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecStarted {
    /// The command's process in the guest.
    pub pid: u32,
}

/// The events `stdout` and `stderr` of `exec/stream`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecOutput {
    /// The bytes, base64.
    pub data: String,
}

/// A text frame from the client on `exec/ws`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ClientMessage {
    /// Starts the command.
    Start(Exec),
    /// Sends a signal, such as `SIGINT`, or its number.
    Signal {
        /// Name or number.
        signal: String,
    },
    /// Ends the command's standard input.
    CloseStdin,
}

/// A text frame from the daemon on `exec/ws`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ServerMessage {
    /// The command runs.
    Started(ExecStarted),
    /// The command ended. The last frame.
    Exit(ExecExit),
    /// The command cannot go on. The last frame.
    Error(ErrorBody),
}

/// Body of `POST /v1/sandboxes/{id}/eval`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Eval {
    /// Expression or statements. The value of a trailing expression is the result.
    pub code: String,
    /// Seconds after which the code is interrupted; 0 is no limit.
    #[serde(default = "default_timeout_secs")]
    pub timeout_secs: u64,
}

/// Answer of `POST /v1/sandboxes/{id}/eval`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EvalResult {
    /// `repr` of the trailing expression; null when there was none or it was `None`.
    pub result: Option<String>,
    /// `Type: message` of an uncaught exception.
    pub error: Option<String>,
    /// 0, or 1 where `error` is present.
    pub exit_code: i64,
    /// What the code printed.
    #[serde(default)]
    pub stdout: String,
    /// What the code wrote to standard error.
    #[serde(default)]
    pub stderr: String,
    /// The exception's traceback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceback: Option<String>,
    /// Whether any of the texts was cut.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub truncated: bool,
}

/// A process that runs in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ProcessInfo {
    /// Its pid in the guest.
    pub pid: u32,
    /// The program and its arguments.
    pub args: Vec<String>,
}

/// Body of `POST /v1/sandboxes/{id}/processes/{pid}/signal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SignalProcess {
    /// Name, such as `SIGTERM`, or number.
    pub signal: String,
}

/// Body of `POST /v1/sandboxes/{id}/processes`: runs in the background, on after the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StartProcess {
    /// The program and its arguments. No shell is involved.
    #[cfg_attr(feature = "openapi", schema(min_items = 1))]
    pub args: Vec<String>,
    /// Seconds after which the process is killed; 0 is no limit.
    #[serde(default)]
    pub timeout_secs: u64,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment, over that of the sandbox.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// User name or number; root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}
