//! QEMU's machine protocol (QMP) as values: commands become bytes, bytes become messages. No I/O.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Ends the greeting.
    Capabilities,
    /// Asks whether the guest runs.
    Status,
    /// Stops the vCPUs.
    Stop,
    /// Lets them go on.
    Continue,
    /// Takes the open file that is sent with it; the answer names its set.
    TakeFile,
    /// Writes CPU and device state, without RAM, into the file of this set. The vCPUs stand still.
    SaveDevices(u64),
    /// Closes the file of this set.
    DropFile(u64),
}

impl Command {
    /// What is being done, in words.
    pub(super) fn step(&self) -> &'static str {
        match self {
            Command::Capabilities => "greet",
            Command::Status => "ask for its status",
            Command::Stop => "pause",
            Command::Continue => "resume",
            Command::TakeFile | Command::SaveDevices(_) | Command::DropFile(_) => {
                "save device state"
            }
        }
    }

    /// How long it may take, on a host with far more VMs than cores.
    pub(super) fn deadline(&self) -> Duration {
        Duration::from_secs(match self {
            Command::Capabilities => 60,
            Command::Status | Command::Stop | Command::Continue => 30,
            Command::TakeFile | Command::DropFile(_) => 30,
            Command::SaveDevices(_) => 60,
        })
    }

    /// The command as a line.
    pub(super) fn encode(&self, id: u64) -> Vec<u8> {
        let mut request = match self {
            Command::Capabilities => json!({"execute": "qmp_capabilities"}),
            Command::Status => json!({"execute": "query-status"}),
            Command::Stop => json!({"execute": "stop"}),
            Command::Continue => json!({"execute": "cont"}),
            Command::TakeFile => json!({"execute": "add-fd"}),
            Command::DropFile(set) => json!({
                "execute": "remove-fd",
                "arguments": {"fdset-id": set},
            }),
            Command::SaveDevices(set) => json!({
                "execute": "xen-save-devices-state",
                // Otherwise QEMU lets go of the disks, for whom it believes to take over.
                "arguments": {"filename": format!("/dev/fdset/{set}"), "live": false},
            }),
        };
        request["id"] = id.into();
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        line
    }
}

/// A message from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    /// The first of a connection.
    Greeting,
    /// The answer to a command.
    Reply {
        /// The command's number.
        id: u64,
        /// What it came to, or QEMU's words for why not.
        result: Result<Value, String>,
    },
    /// Something happened.
    Event(Event),
}

/// What happened to the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The vCPUs stand still.
    Stopped,
    /// The vCPUs run.
    Resumed,
    /// QEMU is about to leave.
    Shutdown(Shutdown),
    /// Nothing that matters here.
    Other,
}

/// Why QEMU leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shutdown {
    /// The guest powered off.
    PowerOff,
    /// The guest reset the machine or panicked.
    Reset,
    /// The host asked for it.
    Host,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    data: Option<EventData>,
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize, Default)]
struct EventData {
    #[serde(default)]
    guest: bool,
    #[serde(default)]
    reason: String,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

/// Reads a line. `None`: it is no message of the protocol.
pub(super) fn parse(line: &[u8]) -> Option<Message> {
    let line: Line = serde_json::from_slice(line).ok()?;
    if line.greeting.is_some() {
        return Some(Message::Greeting);
    }
    if let Some(event) = line.event {
        return Some(Message::Event(event_of(
            &event,
            line.data.unwrap_or_default(),
        )));
    }
    let result = match (line.value, line.error) {
        (_, Some(refusal)) => Err(refusal.desc),
        (Some(value), None) => Ok(value),
        (None, None) => return None,
    };
    // A refusal of something unreadable carries no number; it belongs to nobody.
    Some(Message::Reply {
        id: line.id.unwrap_or(u64::MAX),
        result,
    })
}

fn event_of(name: &str, data: EventData) -> Event {
    match name {
        "STOP" => Event::Stopped,
        "RESUME" => Event::Resumed,
        "SHUTDOWN" => Event::Shutdown(match data.reason.as_str() {
            "guest-reset" | "guest-panic" => Shutdown::Reset,
            _ if data.guest => Shutdown::PowerOff,
            _ => Shutdown::Host,
        }),
        _ => Event::Other,
    }
}

/// The set that the answer to [`Command::TakeFile`] names.
pub(super) fn parse_set(value: &Value) -> Option<u64> {
    value.get("fdset-id")?.as_u64()
}

/// What the answer to [`Command::Status`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// The vCPUs run.
    Running,
    /// They stand still.
    Paused,
    /// State is still being loaded.
    Loading,
    /// QEMU stopped the guest for a reason of its own, or is leaving.
    Dead,
}

/// Reads the answer to [`Command::Status`].
pub(super) fn parse_status(value: &Value) -> Option<Status> {
    Some(match value.get("status")?.as_str()? {
        "running" => Status::Running,
        "inmigrate" => Status::Loading,
        "paused" | "prelaunch" | "save-vm" | "suspended" => Status::Paused,
        _ => Status::Dead,
    })
}
