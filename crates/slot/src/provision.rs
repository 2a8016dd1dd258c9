//! Slots made before any node runs, for those who want to: nodes take them instead of making their own.

use std::ops::Range;
use std::path::Path;

use forkd_host::file::LockFile;

use crate::address::MAX_SLOTS;
use crate::host::{self, Ways};
use crate::registry::Registry;
use crate::slot::Slot;
use crate::sweep::{self, Error, Fate};

/// Held by whoever makes slots ahead or takes all away.
const LOCK: &str = "provision.lock";

/// What was made ahead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Setup {
    /// The numbers of all slots that wait now.
    pub ready: Vec<u32>,
    /// Those of them that were made just now.
    pub made: Vec<u32>,
}

/// What was taken away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Teardown {
    /// What became of each slot.
    pub slots: Vec<(u32, Fate)>,
    /// Whether the host's rules are gone: they stay as long as a slot or a running node does.
    pub rules: bool,
}

/// Makes slots until `count` wait, and tells after each how many do. All or nothing: when one cannot be made, or
/// `told` says to stop by `false`, those made just now are removed; then the answer is `None`. Blocks.
pub fn setup(
    directory: &Path,
    count: u32,
    mut told: impl FnMut(usize) -> bool,
) -> Result<Option<Setup>, Error> {
    let registry = Registry::reserve(directory)?;
    let _lock = LockFile::acquire(&directory.join(LOCK)).map_err(crate::registry::Error::from)?;
    remove_unfinished(&registry)?;
    let ways = host::prepare().map_err(Error::Host)?;
    let mut setup = Setup {
        ready: registry.offered()?,
        made: vec![],
    };
    let mut numbers = 0..MAX_SLOTS;
    let mut goes_on = told(setup.ready.len());
    while goes_on && setup.ready.len() < count as usize {
        let index = match make(&registry, ways, &mut numbers) {
            Ok(index) => index,
            Err(e) => {
                undo(&registry, &setup.made);
                return Err(e);
            }
        };
        setup.made.push(index);
        setup.ready.push(index);
        goes_on = told(setup.ready.len());
    }
    if !goes_on {
        undo(&registry, &setup.made);
        return Ok(None);
    }
    setup.ready.sort_unstable();
    Ok(Some(setup))
}

/// Removes every slot of this host that no running node has and nobody uses, and the host's rules if none is left.
/// `told` hears of each, and ends it by `false`. With `pretend` nothing is done. Blocks.
pub fn teardown(
    directory: &Path,
    pretend: bool,
    mut told: impl FnMut(u32, &Fate) -> bool,
) -> Result<Teardown, Error> {
    let registry = Registry::reserve(directory)?;
    let _lock = LockFile::acquire(&directory.join(LOCK)).map_err(crate::registry::Error::from)?;
    let mut done = Teardown::default();
    let mut complete = true;
    sweep::everything(&registry, pretend, |index, fate| {
        complete = told(index, &fate);
        done.slots.push((index, fate));
        complete
    })?;
    if complete && !pretend {
        done.rules = sweep::rules_of_host(&registry)?;
    }
    Ok(done)
}

/// Makes a slot of the lowest of these numbers that nobody has, and puts it into the reserve. Numbers that were looked at
/// are used up: to ask for those taken again and again would cost more with each slot.
fn make(registry: &Registry, ways: Ways, numbers: &mut Range<u32>) -> Result<u32, Error> {
    for index in numbers {
        if !registry.claim(index)? {
            continue;
        }
        match Slot::make(index, &[], ways).and_then(Slot::leave_ready) {
            Ok(()) => {
                registry.offer(index)?;
                return Ok(index);
            }
            Err(e) => {
                let is_foreign = e.is_taken();
                if !is_foreign {
                    // What led here is the error to tell.
                    let _ = crate::slot::remove(index);
                }
                registry.release(index)?;
                if !is_foreign {
                    return Err(e.into());
                }
            }
        }
    }
    Err(Error::Full)
}

/// What a setup that was killed left.
fn remove_unfinished(registry: &Registry) -> Result<(), Error> {
    let _moving = registry.moves()?;
    let offered = registry.offered()?;
    for index in registry.ours()? {
        if !offered.contains(&index) {
            crate::slot::remove(index)?;
            registry.release(index)?;
        }
    }
    Ok(())
}

/// Removes what was made just now, unless a node has taken it already.
fn undo(registry: &Registry, made: &[u32]) {
    for index in made {
        let undone = || -> Result<(), Error> {
            let _moving = registry.moves()?;
            if registry.offered()?.contains(index) {
                crate::slot::remove(*index)?;
                registry.release(*index)?;
            }
            Ok(())
        };
        if let Err(e) = undone() {
            tracing::warn!(
                slot = index,
                error = forkd_host::chain(&e),
                "a network slot may have leaked"
            );
        }
    }
}
