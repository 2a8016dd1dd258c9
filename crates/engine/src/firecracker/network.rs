//! A guest's network device: the tap of its slot, or one that leads nowhere.
//!
//! Firecracker opens a tap by its name, in the namespace it runs in, and a snapshot with a network device cannot be
//! loaded where there is none. So a VM without a network gets a namespace of its own with a tap that nobody ever
//! switches on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use forkd_host::net::{netns, tap};

use crate::SlotHandles;

/// The tap's name, as in slots: snapshots hold it.
pub(super) const TAP: &str = "forkd-tap0";

/// Where a VM with a network device runs.
#[derive(Debug)]
pub(super) struct Place {
    /// The name of its tap.
    pub(super) tap: String,
    /// The namespace that it is in; this process's if absent.
    pub(super) netns: Option<OwnedFd>,
}

impl Place {
    /// In the namespace of the slot, if that has a tap; else nowhere. Blocks.
    pub(super) fn find(slot: &mut SlotHandles) -> io::Result<Place> {
        match slot.tap_name.take() {
            Some(tap) => Ok(Place {
                tap,
                netns: slot.netns.take(),
            }),
            None => nowhere(),
        }
    }
}

fn nowhere() -> io::Result<Place> {
    let netns = netns::nameless()?;
    let made = netns::enter(netns.as_fd(), || -> io::Result<()> {
        let tap = tap::open(TAP).map_err(io::Error::other)?;
        tap::keep(&tap, true)
    })?;
    made.map(|()| Place {
        tap: TAP.to_owned(),
        netns: Some(netns),
    })
}
