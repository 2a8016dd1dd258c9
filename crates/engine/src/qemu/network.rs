//! A guest's network device: a tap of its slot, or one that leads nowhere.
//!
//! QEMU saves with the device whether its other end understands unfinished frames, and takes it up again only
//! where it does. So a VM without a network gets a tap too, one that nobody ever switches on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use forkd_host::net::{netns, tap};

use forkd_host::chain;

/// The kernel puts a number in.
const NAME: &str = "nowhere%d";

/// A network namespace of no name, whose taps lead nowhere. Made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Nowhere(Mutex<Option<OwnedFd>>);

impl Nowhere {
    /// A new tap; `None` where this host lets nobody make one. Blocks.
    pub(super) fn tap(&self) -> Option<OwnedFd> {
        self.open().map_or_else(
            |error| {
                tracing::debug!(error = chain(&error), "no tap for a VM without a network");
                None
            },
            Some,
        )
    }

    fn open(&self) -> io::Result<OwnedFd> {
        let netns = {
            let mut made = self.0.lock().unwrap_or_else(|poison| poison.into_inner());
            match &*made {
                Some(netns) => netns.try_clone()?,
                None => {
                    let netns = netns::nameless()?;
                    made.insert(netns).try_clone()?
                }
            }
        };
        netns::enter(netns.as_fd(), || tap::open(NAME))?.map_err(io::Error::other)
    }
}
