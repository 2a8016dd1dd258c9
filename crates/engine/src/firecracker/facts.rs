//! What a snapshot depends on: the format that Firecracker wrote its state in, and the CPU that guests see.

use std::collections::BTreeMap;
use std::path::Path;

use super::missing;
use super::request::Tracking;
use crate::facts::{self, Version, host_cpu, say};
use crate::{Error, child};

/// The oldest Firecracker that tells the guest, when a snapshot is loaded, that its connections are gone.
const OLDEST: Version = Version::new(1, 10, 0);
/// Those that cannot deliver anything to a guest's vsock once it was paused and resumed.
const DEAF: [Version; 2] = [Version::new(1, 16, 0), Version::new(1, 16, 1)];
/// The first with another word for the record of written pages.
const TRACKS: Version = Version::new(1, 13, 0);

const VERSION: &str = "firecracker_version";
const FORMAT: &str = "firecracker_snapshot_format";
const CPU: &str = "cpu_model";

/// What the program says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct About {
    /// Its version.
    pub(super) version: Version,
    /// The format of the state it reads and writes.
    pub(super) format: Version,
}

impl About {
    /// How it is asked to record written pages.
    pub(super) fn tracking(self) -> Tracking {
        match self.version < TRACKS {
            true => Tracking::EnableDiffSnapshots,
            false => Tracking::TrackDirtyPages,
        }
    }
}

/// Asks the program for its version and refuses what cannot be used. Blocks.
pub(super) fn ask(program: &Path) -> Result<About, Error> {
    let said = |question| {
        let output = child::ask(program, question, missing)?;
        Ok::<_, Error>(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let version = said("--version")?;
    let version = judge(program, Version::after("Firecracker v", &version))?;
    let format = said("--snapshot-version")?;
    let format = Version::after("v", &format).ok_or_else(|| {
        let problem = "it does not say the format of its snapshots".to_owned();
        unusable(program, problem)
    })?;
    Ok(About { version, format })
}

/// Refuses versions that cannot be used.
pub(super) fn judge(program: &Path, version: Option<Version>) -> Result<Version, Error> {
    match version {
        Some(version) if version < OLDEST => {
            Err(unusable(program, format!("version {version} is too old")))
        }
        Some(version) if DEAF.contains(&version) => Err(unusable(
            program,
            format!("version {version} loses a guest's vsock when it is paused and resumed"),
        )),
        Some(version) => Ok(version),
        None => Err(unusable(program, "it says no version".to_owned())),
    }
}

fn unusable(program: &Path, problem: String) -> Error {
    Error::Program {
        program: program.display().to_string(),
        problem,
        remedy: "install Firecracker 1.10 or later, but neither 1.16.0 nor 1.16.1".to_owned(),
    }
}

/// The facts of this host. Blocks.
pub(super) fn collect(about: About) -> BTreeMap<String, String> {
    BTreeMap::from([
        (VERSION.to_owned(), about.version.to_string()),
        (FORMAT.to_owned(), about.format.to_string()),
        (CPU.to_owned(), host_cpu()),
    ])
}

/// The first difference that keeps a snapshot made there from running here, in words. Firecracker reads states of its
/// own format and of older ones with the same first number.
pub(super) fn difference(
    recorded: &BTreeMap<String, String>,
    here: &BTreeMap<String, String>,
) -> Option<String> {
    let (there, ours) = (recorded.get(FORMAT), here.get(FORMAT));
    let format = |text: Option<&String>| Version::after("", text?);
    let readable = match (format(there), format(ours)) {
        (Some(there), Some(ours)) => there.major == ours.major && there.minor <= ours.minor,
        _ => false,
    };
    if !readable {
        let version = say(recorded.get(VERSION));
        return Some(format!(
            "Firecracker {version} wrote it in format {}, the one here ({}) reads format {}",
            say(there),
            say(here.get(VERSION)),
            say(ours)
        ));
    }
    facts::change(CPU, recorded, here, |there, here| there == here)
}
