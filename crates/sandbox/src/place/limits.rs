//! The limits of a place: what was asked for, and what of it this host enforces. Pure, but for the look at disks.

use std::collections::BTreeSet;
use std::path::PathBuf;

use forkd_host::block::{self, Backing, Device};
use forkd_host::cgroup::{IoRates, Limits};

use super::Wish;
use crate::spec::IoLimit;

/// Processes and threads of one VM, unless said otherwise. A VM has a thread for each vCPU and a few for devices.
const PIDS: u64 = 512;

/// What was asked for besides memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct PlaceLimits {
    /// Processor time, thousandths of one processor.
    pub cpu_milli: Option<u64>,
    /// Processes and threads; `None` is the default.
    pub pids: Option<u64>,
    /// Traffic with disks.
    pub io: IoLimit,
}

/// The disks that a VM's files are on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Disks {
    found: BTreeSet<Device>,
    /// A file that is on none that could be named.
    unknown: Option<PathBuf>,
}

impl Disks {
    /// Looks, if it matters for what is wished.
    pub(super) fn of(wish: &Wish) -> Self {
        let mut disks = Self::default();
        if !wish.limits.io.is_some() {
            return disks;
        }
        for file in &wish.files {
            match block::backing(file) {
                Backing::Disk(device) => {
                    disks.found.insert(device);
                }
                Backing::Memory => {}
                Backing::Unknown => disks.unknown = Some(file.clone()),
            }
        }
        disks
    }

    fn all_known(&self) -> bool {
        self.unknown.is_none() && !self.found.is_empty()
    }
}

/// What the kernel is told: only what it can enforce.
pub(super) fn enforced(wish: &Wish, disks: &Disks, has: impl Fn(&str) -> bool) -> Limits {
    let asked = &wish.limits;
    let io = IoRates {
        read_bytes: asked.io.read_bytes,
        write_bytes: asked.io.write_bytes,
        reads: asked.io.reads,
        writes: asked.io.writes,
    };
    Limits {
        memory_bytes: wish
            .memory_mib
            .filter(|_| has("memory"))
            .map(|mib| mib * 1024 * 1024),
        cpu_milli: asked.cpu_milli.filter(|_| has("cpu")),
        pids: asked.pids.or(Some(PIDS)).filter(|_| has("pids")),
        io: if has("io") { io } else { IoRates::default() },
        disks: disks.found.iter().copied().collect(),
    }
}

/// What was asked for and is not enforced, by the names that requests give it.
pub(super) fn not_enforced(
    wish: &Wish,
    disks: &Disks,
    has: impl Fn(&str) -> bool,
) -> Vec<&'static str> {
    let asked = &wish.limits;
    let judged = [
        ("memory_limit_mib", wish.memory_mib.is_some(), has("memory")),
        ("cpu_limit_milli", asked.cpu_milli.is_some(), has("cpu")),
        ("pids_limit", asked.pids.is_some(), has("pids")),
        (
            "io_limit",
            asked.io.is_some(),
            has("io") && disks.all_known(),
        ),
    ];
    let missed = judged
        .into_iter()
        .filter(|(_, asked, kept)| *asked && !kept);
    missed.map(|(name, ..)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish() -> Wish {
        Wish {
            memory_mib: Some(256),
            limits: PlaceLimits {
                cpu_milli: Some(500),
                pids: Some(100),
                io: IoLimit {
                    write_bytes: Some(1 << 20),
                    ..IoLimit::default()
                },
            },
            ..Wish::default()
        }
    }

    fn disk() -> Disks {
        Disks {
            found: BTreeSet::from([Device { major: 8, minor: 0 }]),
            unknown: None,
        }
    }

    #[test]
    fn a_complete_host_enforces_all_of_it() {
        let limits = enforced(&wish(), &disk(), |_| true);
        assert_eq!(limits.memory_bytes, Some(256 << 20));
        assert_eq!((limits.cpu_milli, limits.pids), (Some(500), Some(100)));
        assert_eq!(limits.io.write_bytes, Some(1 << 20));
        assert_eq!(limits.disks, [Device { major: 8, minor: 0 }]);
        assert!(not_enforced(&wish(), &disk(), |_| true).is_empty());
    }

    #[test]
    fn what_no_controller_keeps_is_told_and_not_written() {
        let none = enforced(&wish(), &disk(), |_| false);
        assert_eq!((none.memory_bytes, none.cpu_milli), (None, None));
        assert_eq!((none.pids, none.io), (None, IoRates::default()));
        assert_eq!(
            not_enforced(&wish(), &disk(), |_| false),
            [
                "memory_limit_mib",
                "cpu_limit_milli",
                "pids_limit",
                "io_limit"
            ]
        );
        for controller in ["memory", "cpu", "pids", "io"] {
            let told = not_enforced(&wish(), &disk(), |has| has != controller);
            assert_eq!(told.len(), 1, "{controller}: {told:?}");
            assert!(told[0].starts_with(controller), "{controller}: {told:?}");
        }
        // Nobody asked, so nobody is told.
        assert!(not_enforced(&Wish::default(), &disk(), |_| false).is_empty());
    }

    #[test]
    fn files_without_a_disk_have_no_limit() {
        for disks in [
            Disks::default(),
            Disks {
                unknown: Some("/var/lib/forkd".into()),
                ..disk()
            },
        ] {
            assert_eq!(not_enforced(&wish(), &disks, |_| true), ["io_limit"]);
        }
    }

    #[test]
    fn processes_are_limited_without_being_asked() {
        let limits = enforced(&Wish::default(), &Disks::default(), |_| true);
        assert_eq!(limits.pids, Some(PIDS));
        assert!(limits.io.is_unlimited());
    }

    #[test]
    fn disks_are_looked_for_only_when_it_matters() {
        let files = vec![PathBuf::from("/nowhere")];
        let idle = Wish {
            files: files.clone(),
            ..Wish::default()
        };
        assert_eq!(Disks::of(&idle), Disks::default());
        let busy = Disks::of(&Wish { files, ..wish() });
        assert_eq!(busy.unknown, Some("/nowhere".into()));
        assert!(!busy.all_known());
    }
}
