//! Slots that nobody has any more: those of nodes whose state is no more, which nothing else would ever remove.

use std::collections::{BTreeMap, BTreeSet};

use forkd_host::chain;
use forkd_host::net::route::Route;
use forkd_host::net::{netns, nft};
use forkd_host::process;
use tracing::warn;

use crate::address::{self, FIRST_USER, MAX_SLOTS, NETNS_PREFIX};
use crate::registry::{Registry, Standing};
use crate::slot::{self, User};
use crate::{pool, rules};

/// Why slots cannot be removed, or made.
pub type Error = pool::OpenError;

/// Why a slot stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// The node of this state file runs.
    Node(String),
    /// Somebody uses it.
    User(User),
}

/// What became of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is gone.
    Removed,
    /// It stays.
    Kept(Keeper),
}

/// How many slots are removed at once. More gain little, and for as long as it takes the kernel lets nobody else change
/// any link.
pub(crate) const BATCH: usize = 64;

/// Removes slots of ours, whatever there is of each, and gives their numbers back. Tells which of them are left and why.
pub(crate) fn clear(registry: &Registry, indices: &[u32]) -> Vec<(u32, Error)> {
    let mut left = Vec::new();
    for batch in indices.chunks(BATCH) {
        let failed = slot::remove_all(batch);
        let is_left = |index: &u32| failed.iter().any(|(left, _)| left == index);
        let gone = batch.iter().filter(|index| !is_left(index));
        let kept = gone.filter_map(|index| Some((*index, registry.release(*index).err()?.into())));
        left.extend(kept.collect::<Vec<_>>());
        left.extend(failed.into_iter().map(|(index, e)| (index, e.into())));
    }
    left
}

/// Logs what is left: for whoever can do nothing about it.
pub(crate) fn log(left: Vec<(u32, Error)>) {
    for (slot, e) in left {
        warn!(slot, error = chain(&e), "a network slot may have leaked");
    }
}

/// The first failure, if there is one.
pub(crate) fn all_gone(left: Vec<(u32, Error)>) -> Result<(), Error> {
    left.into_iter().next().map_or(Ok(()), |(_, e)| Err(e))
}

/// Removes the slots of nodes that are gone for good, but for those that a process still uses: whoever used the number
/// next would share its user.
pub fn gone(registry: &Registry) -> Result<(), Error> {
    let ours = registry.ours()?;
    let mut owners: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for claim in registry.claims()? {
        if !ours.contains(&claim.index) {
            owners.entry(claim.owner).or_default().push(claim.index);
        }
    }
    for (owner, indices) in owners {
        let Standing::Gone(_locked_out) = registry.standing(&owner)? else {
            continue;
        };
        let processes = processes();
        let mut unused = Vec::new();
        for index in indices {
            if slot::user_of(index, &processes)?.is_none() {
                unused.push(index);
            }
        }
        all_gone(clear(registry, &unused))?;
    }
    Ok(())
}

/// The processes that run as users of slots.
pub(crate) fn processes() -> BTreeMap<u32, u32> {
    process::by_user(FIRST_USER..FIRST_USER + MAX_SLOTS)
}

/// Removes every slot that no running node has and nobody uses, whoever made it, and tells what became of each. With
/// `pretend` nothing is done. Ends early when `told` says so, by `false`.
pub(crate) fn everything(
    registry: &Registry,
    pretend: bool,
    mut told: impl FnMut(u32, Fate) -> bool,
) -> Result<(), Error> {
    let mut owners: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for claim in registry.claims()? {
        owners.entry(claim.owner).or_default().push(claim.index);
    }
    let processes = processes();
    for (owner, indices) in owners {
        // Held to the end: the node does not begin to run meanwhile.
        let standing = registry.standing(&owner)?;
        for batch in indices.chunks(BATCH) {
            let fates = match standing {
                Standing::Running => {
                    let kept = |index: &u32| (*index, Fate::Kept(Keeper::Node(owner.clone())));
                    batch.iter().map(kept).collect()
                }
                _ => remove_unused(registry, batch, Some(&owner), &processes, pretend)?,
            };
            if !tell(fates, &mut told) {
                return Ok(());
            }
        }
    }
    for batch in unclaimed(registry)?.chunks(BATCH) {
        let fates = remove_unused(registry, batch, None, &processes, pretend)?;
        if !tell(fates, &mut told) {
            return Ok(());
        }
    }
    Ok(())
}

/// Tells all of it, whatever is said to any of it: it has happened. Whether to go on.
fn tell(fates: Vec<(u32, Fate)>, mut told: impl FnMut(u32, Fate) -> bool) -> bool {
    let mut goes_on = true;
    for (index, fate) in fates {
        goes_on &= told(index, fate);
    }
    goes_on
}

/// Removes slots unless somebody uses them. Says nothing of those that have another owner by now.
fn remove_unused(
    registry: &Registry,
    indices: &[u32],
    owner: Option<&str>,
    processes: &BTreeMap<u32, u32>,
    pretend: bool,
) -> Result<Vec<(u32, Fate)>, Error> {
    let _moving = registry.moves()?;
    let (mut fates, mut unused) = (Vec::new(), Vec::new());
    for index in indices {
        if registry.owner_of(*index)?.as_deref() != owner {
            continue;
        }
        if let Some(user) = slot::user_of(*index, processes)? {
            fates.push((*index, Fate::Kept(Keeper::User(user))));
        } else if pretend || owner.is_some() || registry.claim(*index)? {
            // What nobody had is claimed: a node that begins to make a slot of this number finds it taken.
            unused.push(*index);
        }
    }
    if !pretend {
        all_gone(clear(registry, &unused))?;
    }
    fates.extend(unused.into_iter().map(|index| (index, Fate::Removed)));
    fates.sort_unstable_by_key(|(index, _)| *index);
    Ok(fates)
}

/// The numbers of namespaces and devices that bear our names and that nobody has claimed: made by hand.
fn unclaimed(registry: &Registry) -> Result<Vec<u32>, Error> {
    let spaces = netns::list(NETNS_PREFIX).map_err(slot::Error::from)?;
    let links = Route::open().and_then(|mut route| route.links());
    let links = links.map_err(|source| slot::Error::Route { index: 0, source })?;
    let spaces = spaces.iter().filter_map(|name| address::index_of(name));
    let links = links
        .iter()
        .filter_map(|link| address::index_of_veth(&link.name));
    let mut found: Vec<u32> = spaces.chain(links).collect();
    found.sort_unstable();
    found.dedup();
    // Looked at last: a node claims a number before it makes anything.
    let claims = registry.claims()?.into_iter();
    let claimed: BTreeSet<u32> = claims.map(|claim| claim.index).collect();
    found.retain(|index| !claimed.contains(index));
    Ok(found)
}

/// Takes the host's rules away if no node runs and no slot is left. Whether they are gone.
pub(crate) fn rules_of_host(registry: &Registry) -> Result<bool, Error> {
    registry.forget_nodes()?;
    let removed = registry.alone(|| {
        if !registry.claims()?.is_empty() {
            return Ok(false);
        }
        nft::apply(&rules::nothing()).map_err(Error::Rules)?;
        Ok(true)
    })?;
    removed.unwrap_or(Ok(false))
}
