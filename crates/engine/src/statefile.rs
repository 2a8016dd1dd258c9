//! A snapshot's state file, for engines whose monitor is another project's: what that wrote, behind a head.
//!
//! ```text
//!   magic, 8 bytes   header length, u32 little-endian   header, JSON   the monitor's device state
//! ```
//!
//! Monitors check little of what they read: the header holds its length and hash, so that damage is found before a
//! VM is started with it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use forkd_host::file::read_bounded;
use serde::{Deserialize, Serialize};

use crate::rundir::failed;
use crate::{Error, MachineSpec};
use forkd_host::chain;

/// Device state of a small machine is 150 KiB; some of that is per vCPU and per device.
pub(crate) const DEVICES_MAX: u64 = 64 << 20;
const HEADER_MAX: u32 = 64 << 10;

/// Whose state files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Format {
    /// How they begin.
    pub(crate) magic: [u8; 8],
    /// The engine that reads them.
    pub(crate) engine: &'static str,
}

/// The head of a state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    /// The machine's vCPUs.
    pub(crate) vcpus: u32,
    /// Its RAM.
    pub(crate) memory_mib: u64,
    /// Whether it has a network device.
    pub(crate) network: bool,
    /// Length of the monitor's part, in bytes.
    pub(crate) devices_bytes: u64,
    /// blake3 of the monitor's part, in hex.
    pub(crate) devices_blake3: String,
}

impl Format {
    /// Writes a state file from what the monitor wrote.
    pub(crate) fn write(&self, devices: &Path, machine: &Shape, to: &Path) -> Result<(), Error> {
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
        let header =
            serde_json::to_vec(&header).map_err(|error| failed("encode", to)(error.into()))?;
        let length = u32::try_from(header.len()).unwrap_or(u32::MAX);
        let write = || -> io::Result<()> {
            let mut file = File::create_new(to)?;
            file.write_all(&self.magic)?;
            file.write_all(&length.to_le_bytes())?;
            file.write_all(&header)?;
            file.write_all(&devices)
        };
        write().map_err(failed("write", to))
    }

    /// Opens and checks a state file.
    pub(crate) fn open(&self, path: &Path, machine: &MachineSpec) -> Result<StateFile, Error> {
        let mut file = File::open(path).map_err(failed("open", path))?;
        let unusable = |problem: String| Error::Snapshot {
            path: path.to_owned(),
            problem: format!("{problem}; make the snapshot anew"),
        };
        let header = self.read_header(&mut file).map_err(unusable)?;
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

    fn read_header(&self, file: &mut File) -> Result<Header, String> {
        let truncated = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
            _ => error.to_string(),
        };
        let mut magic = [0; 8];
        file.read_exact(&mut magic).map_err(truncated)?;
        if magic != self.magic {
            return Err(format!(
                "it is no device state of the {} engine",
                self.engine
            ));
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
}

/// A state file that has been checked.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    file: File,
    /// Where the monitor's part begins.
    devices_at: u64,
}

impl StateFile {
    /// Where it was.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file opened once more, at the monitor's part, even if its name is gone.
    pub(crate) fn devices(&self) -> Result<File, Error> {
        use std::os::fd::AsRawFd;
        let open = || -> io::Result<File> {
            let mut file = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
            file.seek(SeekFrom::Start(self.devices_at))?;
            Ok(file)
        };
        open().map_err(failed("open", &self.path))
    }
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
pub(crate) struct Shape {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) network: bool,
}

impl Shape {
    pub(crate) fn of(machine: &MachineSpec) -> Shape {
        Shape {
            vcpus: machine.vcpus,
            memory_mib: machine.memory_mib,
            network: machine.network,
        }
    }

    /// RAM in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
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
