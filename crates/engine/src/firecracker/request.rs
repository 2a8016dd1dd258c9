//! Firecracker's API as values: requests become a method, a path and a body, answers become results. No I/O.

use std::path::Path;
use std::time::Duration;

use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::names::{DEVICES, INITRAMFS, KERNEL, MEMORY, ROOTFS, STATE, VSOCK};
use crate::MachineSpec;

/// Every guest has a network of its own, so they may all have the same address.
const MAC: &str = "02:f0:4b:00:00:01";
/// The guest's number on its vsock; the lowest that a guest can have. Nobody else is there.
const CID: u32 = 3;
/// What a name of a disk or network device is within Firecracker.
const ROOT: &str = "root";
const NET: &str = "net";

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request<'a> {
    /// Processors and memory.
    Machine(&'a MachineSpec),
    /// The kernel, and its command line.
    BootSource(&'a str),
    /// The root disk.
    Disk,
    /// The channel to the agent.
    Vsock,
    /// The network device, on the tap of this name.
    Network(&'a str),
    /// A source of entropy.
    Entropy,
    /// The guest begins.
    Start,
    /// A snapshot is loaded, and the guest goes on where it was.
    Load(Tracking),
    /// Asks whether the guest runs.
    Status,
    /// Stops the vCPUs.
    Pause,
    /// Lets them go on.
    Resume,
    /// Writes device state, and memory to this file. The vCPUs stand still.
    Save(&'a Path, Extent),
}

/// What of memory a save writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// All.
    Full,
    /// What was written since the snapshot was loaded or the VM was last saved.
    Written,
}

/// What asking for a record of written pages is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tracking {
    /// Before version 1.13.
    EnableDiffSnapshots,
    /// Since then.
    TrackDirtyPages,
}

impl Request<'_> {
    /// What is being done, in words.
    pub(super) fn step(&self) -> &'static str {
        match self {
            Request::Machine(_) => "set up the machine",
            Request::BootSource(_) => "set up the kernel",
            Request::Disk => "set up the root disk",
            Request::Vsock => "set up the channel to the agent",
            Request::Network(_) => "set up the network device",
            Request::Entropy => "set up the source of entropy",
            Request::Start => "start the guest",
            Request::Load(_) => "load the snapshot",
            Request::Status => "ask for its status",
            Request::Pause => "pause",
            Request::Resume => "resume",
            Request::Save(..) => "save",
        }
    }

    /// How long it may take, on a host with far more VMs than cores. All of a large memory may be written to a slow
    /// disk.
    pub(super) fn deadline(&self) -> Duration {
        Duration::from_secs(match self {
            Request::Save(..) => 600,
            Request::Load(_) | Request::Start => 60,
            _ => 30,
        })
    }

    /// How it is sent: what is asked of which resource.
    pub(super) fn encode(&self) -> (Method, &'static str, Option<Value>) {
        let (path, body) = match self {
            Request::Status => return (Method::GET, "/", None),
            Request::Pause => return state("Paused"),
            Request::Resume => return state("Resumed"),
            Request::Machine(machine) => ("/machine-config", machine_config(machine)),
            Request::BootSource(line) => ("/boot-source", boot_source(line)),
            Request::Disk => ("/drives/root", disk()),
            Request::Vsock => ("/vsock", json!({"guest_cid": CID, "uds_path": VSOCK})),
            Request::Network(tap) => (
                "/network-interfaces/net",
                json!({"iface_id": NET, "host_dev_name": tap, "guest_mac": MAC}),
            ),
            Request::Entropy => ("/entropy", json!({})),
            Request::Start => ("/actions", json!({"action_type": "InstanceStart"})),
            Request::Load(tracking) => ("/snapshot/load", load(*tracking)),
            Request::Save(memory, extent) => ("/snapshot/create", save(memory, *extent)),
        };
        (Method::PUT, path, Some(body))
    }
}

fn state(state: &str) -> (Method, &'static str, Option<Value>) {
    (Method::PATCH, "/vm", Some(json!({"state": state})))
}

fn machine_config(machine: &MachineSpec) -> Value {
    json!({"vcpu_count": machine.vcpus, "mem_size_mib": machine.memory_mib, "smt": false})
}

fn boot_source(line: &str) -> Value {
    json!({"kernel_image_path": KERNEL, "initrd_path": INITRAMFS, "boot_args": line})
}

fn disk() -> Value {
    json!({
        "drive_id": ROOT,
        "path_on_host": ROOTFS,
        // The agent mounts it, not the kernel.
        "is_root_device": false,
        "is_read_only": true,
    })
}

fn load(tracking: Tracking) -> Value {
    let tracking = match tracking {
        Tracking::EnableDiffSnapshots => "enable_diff_snapshots",
        Tracking::TrackDirtyPages => "track_dirty_pages",
    };
    json!({
        "snapshot_path": STATE,
        "mem_backend": {"backend_type": "File", "backend_path": MEMORY},
        tracking: true,
        "resume_vm": true,
    })
}

fn save(memory: &Path, extent: Extent) -> Value {
    json!({
        "snapshot_type": match extent {
            Extent::Full => "Full",
            Extent::Written => "Diff",
        },
        "snapshot_path": DEVICES,
        "mem_file_path": memory,
    })
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// Why a request was refused, in Firecracker's words.
pub(super) fn parse_fault(body: &[u8]) -> String {
    let fault = serde_json::from_slice(body).map(|fault: Fault| fault.fault_message);
    let text = fault.unwrap_or_else(|_| String::from_utf8_lossy(body).into_owned());
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().filter(|c| !c.is_control()).collect()
}

#[derive(Deserialize)]
struct Instance {
    state: String,
}

/// Reads the answer to [`Request::Status`]: whether the guest runs. `None`: it is not understood.
pub(super) fn parse_running(body: &[u8]) -> Option<bool> {
    let instance: Instance = serde_json::from_slice(body).ok()?;
    match instance.state.as_str() {
        "Running" => Some(true),
        "Paused" | "Not started" => Some(false),
        _ => None,
    }
}
