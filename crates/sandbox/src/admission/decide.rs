//! The decision. Pure.

use std::path::PathBuf;

use super::{Admission, Resource};

/// What is asked for, or promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) sandboxes: u64,
    pub(super) vcpus: u64,
    pub(super) memory_mib: u64,
}

impl Load {
    pub(super) fn plus(self, other: Load) -> Load {
        Load {
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
        }
    }

    pub(super) fn minus(self, other: Load) -> Load {
        Load {
            sandboxes: self.sandboxes.saturating_sub(other.sandboxes),
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
        }
    }
}

/// What there is, promises included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) sandboxes: u64,
    pub(super) vcpus: u64,
    /// How many there may be.
    pub(super) vcpus_max: Option<u64>,
    /// What can be used now.
    pub(super) memory_mib: Option<u64>,
    /// What of it is promised.
    pub(super) promised_mib: u64,
    /// A path that has too little space: how much it has, and must have, MiB.
    pub(super) short_of_disk: Option<(PathBuf, u64, u64)>,
}

/// Why something was not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("this node has {there} sandboxes and may have {max}, {asked} more were asked for")]
    Sandboxes { there: u64, asked: u64, max: u64 },
    #[error(
        "its sandboxes have {there} virtual CPUs and may have {max}, {asked} more were asked for"
    )]
    Vcpus { there: u64, asked: u64, max: u64 },
    #[error("{} has {free} MiB of disk free, {reserve} MiB stay free", .path.display())]
    Disk {
        path: PathBuf,
        free: u64,
        reserve: u64,
    },
    #[error(
        "{asked} MiB of memory are needed over a reserve of {reserve} MiB and {promised} MiB promised to others, \
         {available} MiB are available"
    )]
    Memory {
        asked: u64,
        reserve: u64,
        promised: u64,
        available: u64,
    },
}

impl Refusal {
    pub(super) fn resource(&self) -> Resource {
        match self {
            Self::Sandboxes { .. } => Resource::Sandboxes,
            Self::Vcpus { .. } => Resource::Vcpus,
            Self::Disk { .. } => Resource::Disk,
            Self::Memory { .. } => Resource::Memory,
        }
    }
}

/// Whether there is room. What a host does not tell bounds nothing, and what is not asked for is not judged.
pub(super) fn decide(bounds: &Admission, asked: Load, found: &Found) -> Result<(), Refusal> {
    let exceeds = |there: u64, asked: u64, max: u64| asked > 0 && there.saturating_add(asked) > max;
    let max = u64::from(bounds.sandboxes_max);
    if exceeds(found.sandboxes, asked.sandboxes, max) {
        return Err(Refusal::Sandboxes {
            there: found.sandboxes,
            asked: asked.sandboxes,
            max,
        });
    }
    if let Some(max) = found.vcpus_max
        && exceeds(found.vcpus, asked.vcpus, max)
    {
        return Err(Refusal::Vcpus {
            there: found.vcpus,
            asked: asked.vcpus,
            max,
        });
    }
    if let Some((path, free, reserve)) = &found.short_of_disk
        && asked.sandboxes > 0
    {
        return Err(Refusal::Disk {
            path: path.clone(),
            free: *free,
            reserve: *reserve,
        });
    }
    let kept = bounds.memory_reserve_mib.saturating_add(found.promised_mib);
    if let Some(available) = found.memory_mib
        && (asked.memory_mib > 0 || asked.sandboxes > 0)
        && asked.memory_mib.saturating_add(kept) > available
    {
        return Err(Refusal::Memory {
            asked: asked.memory_mib,
            reserve: bounds.memory_reserve_mib,
            promised: found.promised_mib,
            available,
        });
    }
    Ok(())
}
