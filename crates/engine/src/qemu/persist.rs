//! What is written down: a snapshot's state file, and a VM's record for the next daemon.
//!
//! ```text
//!   state file:  magic "FKDQEMU1"   header length, u32 little-endian   header, JSON   QEMU's device state
//! ```
//!
//! QEMU reads its part from the file at the offset where it begins, and checks little of it: the header
//! holds its length and hash, so that damage is found before a VM is started with it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use forkd_host::file::read_bounded;
use serde::{Deserialize, Serialize};

use crate::rundir::failed;
use crate::{Error, MachineSpec};
use forkd_host::chain;

const MAGIC: [u8; 8] = *b"FKDQEMU1";
/// Device state of a small machine is 150 KiB; some of that is per vCPU and per device.
pub(super) const DEVICES_MAX: u64 = 64 << 20;
const HEADER_MAX: u32 = 64 << 10;

/// The head of a state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// The machine's vCPUs.
    pub(super) vcpus: u32,
    /// Its RAM.
    pub(super) memory_mib: u64,
    /// Whether it has a network device.
    pub(super) network: bool,
    /// Length of QEMU's part, in bytes.
    pub(super) devices_bytes: u64,
    /// blake3 of QEMU's part, in hex.
    pub(super) devices_blake3: String,
}

/// Writes a state file from what QEMU wrote.
pub(super) fn write_state(devices: &Path, machine: &Shape, to: &Path) -> Result<(), Error> {
    let devices = read_bounded(devices, DEVICES_MAX).map_err(|error| Error::Control {
        step: "save device state",
        detail: chain(&error),
    })?;
    let header = Header {
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        network: machine.network,
        devices_bytes: devices.len() as u64,
        devices_blake3: blake3::hash(&devices).to_hex().to_string(),
    };
    let header = serde_json::to_vec(&header).map_err(|error| failed("encode", to)(error.into()))?;
    let length = u32::try_from(header.len()).unwrap_or(u32::MAX);
    let write = || -> io::Result<()> {
        let mut file = File::create_new(to)?;
        file.write_all(&MAGIC)?;
        file.write_all(&length.to_le_bytes())?;
        file.write_all(&header)?;
        file.write_all(&devices)
    };
    write().map_err(failed("write", to))
}

/// A state file that has been checked.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    file: File,
    /// Where QEMU's part begins.
    devices_at: u64,
}

impl StateFile {
    /// Opens and checks a state file.
    pub(super) fn open(path: &Path, machine: &MachineSpec) -> Result<StateFile, Error> {
        let mut file = File::open(path).map_err(failed("open", path))?;
        let unusable = |problem: String| Error::Snapshot {
            path: path.to_owned(),
            problem: format!("{problem}; make the snapshot anew"),
        };
        let header = read_header(&mut file).map_err(unusable)?;
        let (found, wanted) = (header.shape(), Shape::of(machine));
        if found != wanted {
            return Err(unusable(format!(
                "it is of a machine with {found}, wanted is one with {wanted}"
            )));
        }
        let devices_at = file.stream_position().map_err(failed("read", path))?;
        check_devices(&mut file, &header).map_err(unusable)?;
        let path = path.to_owned();
        Ok(StateFile {
            path,
            file,
            devices_at,
        })
    }

    /// Where it was.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file opened once more, at QEMU's part, even if its name is gone.
    pub(super) fn devices(&self) -> Result<File, Error> {
        use std::os::fd::AsRawFd;
        let open = || -> io::Result<File> {
            let mut file = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
            file.seek(SeekFrom::Start(self.devices_at))?;
            Ok(file)
        };
        open().map_err(failed("open", &self.path))
    }
}

fn read_header(file: &mut File) -> Result<Header, String> {
    let truncated = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
        _ => error.to_string(),
    };
    let mut magic = [0; MAGIC.len()];
    file.read_exact(&mut magic).map_err(truncated)?;
    if magic != MAGIC {
        return Err("it is no device state of the qemu engine".to_owned());
    }
    let mut length = [0; 4];
    file.read_exact(&mut length).map_err(truncated)?;
    let length = u32::from_le_bytes(length);
    if length > HEADER_MAX {
        return Err("its header is damaged".to_owned());
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(truncated)?;
    serde_json::from_slice(&header).map_err(|_| "its header is damaged".to_owned())
}

fn check_devices(file: &mut File, header: &Header) -> Result<(), String> {
    let mut hasher = blake3::Hasher::new();
    let mut bounded = file.take(DEVICES_MAX + 1);
    let found = io::copy(&mut bounded, &mut hasher).map_err(|error| error.to_string())?;
    if found != header.devices_bytes {
        return Err(format!(
            "it holds {found} bytes of device state, not {}",
            header.devices_bytes
        ));
    }
    if hasher.finalize().to_hex().as_str() != header.devices_blake3 {
        return Err("its device state is damaged".to_owned());
    }
    Ok(())
}

/// What must be the same in a machine and in those forked from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) vcpus: u32,
    pub(super) memory_mib: u64,
    pub(super) network: bool,
}

impl Shape {
    pub(super) fn of(machine: &MachineSpec) -> Shape {
        Shape {
            vcpus: machine.vcpus,
            memory_mib: machine.memory_mib,
            network: machine.network,
        }
    }

    /// RAM in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }
}

impl Header {
    fn shape(&self) -> Shape {
        Shape {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            network: self.network,
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let network = if self.network { "a" } else { "no" };
        let (vcpus, memory) = (self.vcpus, self.memory_mib);
        write!(
            f,
            "{vcpus} vCPUs, {memory} MiB of memory and {network} network device"
        )
    }
}

/// What the next daemon must know of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The VM's id.
    pub(super) id: String,
    /// The machine.
    pub(super) shape: Shape,
    /// The file RAM is mapped from.
    pub(super) ram: PathBuf,
    /// Whether RAM *is* that file; otherwise pages that were written are private to the process.
    pub(super) shared: bool,
}
