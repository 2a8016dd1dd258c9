//! What a snapshot depends on: the CPU's maker and the kind of KVM. The features of the CPU and the
//! version of the format are in the state file, which the monitor compares itself.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use super::program::PROGRAM;
use crate::{Error, facts};

const VENDOR: &str = "cpu_vendor";
const KIND: &str = "kvm_kind";

/// What the monitor says of this host.
#[derive(Debug, Deserialize)]
struct Checked {
    vendor: String,
    hardware_virtualization: bool,
}

/// Asks the monitor whether and how KVM works here. Blocks.
pub(super) fn ask(program: &Path) -> Result<BTreeMap<String, String>, Error> {
    let output = Command::new(program).arg("check").output();
    let output = output.map_err(|source| Error::Spawn {
        program: program.display().to_string(),
        source,
    })?;
    let unusable = |problem: String| Error::Program {
        program: PROGRAM.to_owned(),
        problem,
        remedy: "see `forkd doctor`, or use --engine qemu, which needs no /dev/kvm".to_owned(),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().trim_start_matches("forkd-vmm: ");
        return Err(unusable(match said {
            "" => format!("its check ended with {}", output.status),
            said => said.to_owned(),
        }));
    }
    parse(&output.stdout).ok_or_else(|| unusable("its check is not understood".to_owned()))
}

/// The facts in what the check printed.
pub(super) fn parse(text: &[u8]) -> Option<BTreeMap<String, String>> {
    let checked: Checked = serde_json::from_slice(text).ok()?;
    let kind = match checked.hardware_virtualization {
        true => "hardware",
        false => "paravirtual",
    };
    Some(BTreeMap::from([
        (VENDOR.to_owned(), checked.vendor),
        (KIND.to_owned(), kind.to_owned()),
    ]))
}

/// The first difference that keeps a snapshot made there from running here, in words.
pub(super) fn difference(
    recorded: &BTreeMap<String, String>,
    here: &BTreeMap<String, String>,
) -> Option<String> {
    let mut keys = [VENDOR, KIND].into_iter();
    keys.find_map(|key| facts::change(key, recorded, here, |there, here| there == here))
}
