//! What a snapshot depends on: QEMU's version, the CPU that guests see, the rate of its counter.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Accel, missing};
use crate::facts::{self, Version, host_cpu};
use crate::{Error, child};

/// The oldest QEMU whose machine and options are as needed.
const OLDEST: Version = Version::new(7, 0, 0);
/// How far the counter's rate may be off before a guest's clock visibly is: one in so many.
const TSC_TOLERANCE: u64 = 500;

const VERSION: &str = "qemu_version";
const MACHINE: &str = "machine_type";
const ACCEL: &str = "accelerator";
const CPU: &str = "cpu_model";
const TSC: &str = "tsc_khz";

/// Finds the version in what `--version` prints.
pub(super) fn parse(text: &str) -> Option<Version> {
    Version::after("version ", text)
}

/// Asks the program for its version and refuses what cannot be used. Blocks.
pub(super) fn ask_version(program: &Path) -> Result<Version, Error> {
    let output = child::ask(program, "--version", missing)?;
    let unusable = |problem: String| Error::Program {
        program: program.display().to_string(),
        problem,
        remedy: "install QEMU 7.0 or later with `apt-get install qemu-system-x86`".to_owned(),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    match parse(&text) {
        Some(version) if version >= OLDEST => Ok(version),
        Some(version) => Err(unusable(format!("version {version} is too old"))),
        None => Err(unusable(format!("it says no version ({})", output.status))),
    }
}

/// The facts of this host.
pub(super) fn collect(
    version: Version,
    accel: Accel,
    tsc_khz: Option<u64>,
) -> BTreeMap<String, String> {
    let cpu = match accel {
        Accel::Tcg => accel.cpu().to_owned(),
        Accel::Kvm => host_cpu(),
    };
    let mut facts = BTreeMap::from([
        (VERSION.to_owned(), version.to_string()),
        (MACHINE.to_owned(), "microvm".to_owned()),
        (ACCEL.to_owned(), accel.name().to_owned()),
        (CPU.to_owned(), cpu),
    ]);
    if let Some(khz) = tsc_khz {
        facts.insert(TSC.to_owned(), khz.to_string());
    }
    facts
}

/// The first difference that keeps a snapshot made there from running here, in words.
pub(super) fn difference(
    recorded: &BTreeMap<String, String>,
    here: &BTreeMap<String, String>,
) -> Option<String> {
    let mut keys = [VERSION, MACHINE, ACCEL, CPU, TSC].into_iter();
    keys.find_map(|key| {
        facts::change(key, recorded, here, |there, here| match key {
            VERSION => series(there) == series(here),
            TSC => near(there, here),
            _ => there == here,
        })
    })
}

/// Within a series, QEMU keeps the format of device state.
fn series(version: Option<&String>) -> Option<(&str, &str)> {
    let mut numbers = version?.split('.');
    Some((numbers.next()?, numbers.next()?))
}

fn near(there: Option<&String>, here: Option<&String>) -> bool {
    let number = |fact: Option<&String>| fact.and_then(|text| text.parse::<u64>().ok());
    match (number(there), number(here)) {
        (Some(there), Some(here)) => there.abs_diff(here) <= here / TSC_TOLERANCE,
        (there, here) => there == here,
    }
}
