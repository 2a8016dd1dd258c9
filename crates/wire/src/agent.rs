//! What the host and the guest agent say to each other.
//!
//! The agent speaks HTTP/1.1 and HTTP/2. Its process and file services follow the Connect protocol
//! (JSON codec) with the service and message names of E2B's in-guest daemon; the services of this
//! module stand beside them. An agent frozen inside an old snapshot must still be understood, so
//! this module only grows: fields are added with defaults, never renamed or removed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

mod bytes64;
pub mod connect;
pub mod filesystem;
pub mod process;

use connect::Code;

/// The vsock port the agent listens on.
pub const AGENT_PORT: u32 = 49983;

/// The name of the virtio-serial port the agent serves where there is no vsock.
pub const AGENT_SERIAL_PORT: &str = "forkd.agent";

/// The version of the services in this module; grows with additions.
pub const AGENT_PROTOCOL_VERSION: u32 = 1;

/// `GET`: answers [`Health`] once the guest has booted.
pub const HEALTH_PATH: &str = "/health";
/// `POST`, unary Connect JSON: [`ResumeRequest`] to [`ResumeResponse`].
pub const RESUME_PATH: &str = "/forkd.agent.v1.Agent/Resume";
/// `POST`, unary Connect JSON: [`EvalRequest`] to [`EvalResponse`].
pub const EVAL_PATH: &str = "/forkd.agent.v1.Agent/Eval";
/// `POST`, unary Connect JSON: `{}` to `{}`; a polite power-off, answered before it happens.
pub const SHUTDOWN_PATH: &str = "/forkd.agent.v1.Agent/Shutdown";
/// `POST /forkd.agent.v1.Tunnel/<port>`: a byte stream to TCP 127.0.0.1:`port` in the guest. The
/// request body goes to the port, the response body comes from it.
pub const TUNNEL_PATH_PREFIX: &str = "/forkd.agent.v1.Tunnel/";

/// How the agent is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// The agent's package version.
    pub agent_version: String,
    /// [`AGENT_PROTOCOL_VERSION`] of the agent.
    pub protocol: u32,
    /// The guest's kernel release.
    #[serde(default)]
    pub kernel: String,
    /// The path of the Python interpreter in the guest, if there is one.
    #[serde(default)]
    pub python: Option<String>,
}

/// What makes a fork an individual. Sent once to every fork before anything else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeRequest {
    /// The sandbox's id.
    pub sandbox_id: String,
    /// The fork's index within its fan-out, from 0.
    #[serde(default)]
    pub index: u32,
    /// Fresh entropy, base64, at least 32 bytes decoded.
    pub entropy: String,
    /// The host's wall clock, nanoseconds since the Unix epoch.
    pub wall_clock_ns: u64,
    /// The hostname to take.
    pub hostname: String,
    /// The machine id to take, 32 lower-case hex digits.
    pub machine_id: String,
    /// Environment for every process started from now on, over what the snapshot had.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The address to take, if the guest has a network device.
    #[serde(default)]
    pub network: Option<GuestNetwork>,
}

/// The guest's end of its slot's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestNetwork {
    /// Address with prefix length, such as `10.42.0.2/24`.
    pub address: String,
    /// Default gateway.
    pub gateway: String,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<String>,
    /// MAC address to take, lower case with colons.
    #[serde(default)]
    pub mac: Option<String>,
    /// The gateway's MAC address, if whoever sends this vouches for it. A fork whose parent was sent the same, this
    /// included, finds everything in place and is left as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_mac: Option<String>,
    /// Address and gateway of version 6, where the slot has that. The guest of an agent that does
    /// not know of it has version 4 alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<GuestNetwork6>,
}

/// The guest's end of its slot's network of version 6.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestNetwork6 {
    /// Address with prefix length, such as `fd00::2/64`.
    pub address: String,
    /// Default gateway.
    pub gateway: String,
}

/// The fork has become an individual; it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeResponse {
    /// The agent's package version.
    pub agent_version: String,
    /// Microseconds the agent spent applying the request.
    pub applied_us: u64,
    /// Names of warmed interpreters that reseeded their generators, such as `python`.
    #[serde(default)]
    pub reseeded: Vec<String>,
}

/// Code to run in the persistent interpreter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvalRequest {
    /// The interpreter; only `python` so far.
    #[serde(default = "default_language")]
    pub language: String,
    /// Expression or statements. The value of a trailing expression is the result. Empty code
    /// starts the interpreter and does nothing else.
    pub code: String,
    /// Milliseconds after which the code is interrupted; 0 is no limit.
    #[serde(default)]
    pub timeout_ms: u64,
}

fn default_language() -> String {
    "python".to_owned()
}

impl ResumeRequest {
    /// The fresh entropy as bytes, or what is wrong with it.
    pub fn entropy_bytes(&self) -> Result<Vec<u8>, String> {
        let bytes = bytes64::decode(&self.entropy).map_err(|error| error.to_string())?;
        match bytes.len() {
            32..=512 => Ok(bytes),
            len => Err(format!("{len} bytes of entropy; 32 to 512 are needed")),
        }
    }
}

/// What the code came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvalResponse {
    /// `repr` of the trailing expression, absent when there was none or it was `None`.
    #[serde(default)]
    pub result: Option<String>,
    /// What the code printed, bounded; `truncated` says when it was cut.
    #[serde(default)]
    pub stdout: String,
    /// What the code wrote to standard error, bounded.
    #[serde(default)]
    pub stderr: String,
    /// `Type: message` of an uncaught exception.
    #[serde(default)]
    pub error: Option<String>,
    /// The exception's traceback.
    #[serde(default)]
    pub traceback: Option<String>,
    /// Whether any of the texts was cut.
    #[serde(default)]
    pub truncated: bool,
}

/// The body of a failed Connect call.
///
/// Source: Connect protocol, "Error End-Stream" and "Unary-Response" (connectrpc.com/docs/protocol).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectError {
    /// A Connect code such as `not_found`, `invalid_argument`, `deadline_exceeded`.
    pub code: String,
    /// What went wrong and what would help.
    #[serde(default)]
    pub message: String,
}

impl ConnectError {
    /// An error of `code`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code: code.name().to_owned(),
            message: message.into(),
        }
    }
}
