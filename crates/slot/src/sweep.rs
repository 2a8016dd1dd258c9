//! Slots that nobody has any more: those of nodes whose state is no more, which nothing else would ever remove.

use std::collections::BTreeMap;

use forkd_host::net::route::Route;
use forkd_host::net::{netns, nft};
use forkd_host::process;

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
        for index in indices {
            if slot::user_of(index, &processes)?.is_none() {
                slot::remove(index)?;
                registry.release(index)?;
            }
        }
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
        let standing = registry.standing(&owner)?;
        for index in indices {
            let fate = match standing {
                Standing::Running => Some(Fate::Kept(Keeper::Node(owner.clone()))),
                _ => remove_unused(registry, index, Some(&owner), &processes, pretend)?,
            };
            if fate.is_some_and(|fate| !told(index, fate)) {
                return Ok(());
            }
        }
    }
    for index in unclaimed(registry)? {
        let fate = remove_unused(registry, index, None, &processes, pretend)?;
        if fate.is_some_and(|fate| !told(index, fate)) {
            return Ok(());
        }
    }
    Ok(())
}

/// Removes a slot unless somebody uses it. `None` if it has another owner by now.
fn remove_unused(
    registry: &Registry,
    index: u32,
    owner: Option<&str>,
    processes: &BTreeMap<u32, u32>,
    pretend: bool,
) -> Result<Option<Fate>, Error> {
    let _moving = registry.moves()?;
    if registry.owner_of(index)?.as_deref() != owner {
        return Ok(None);
    }
    if let Some(user) = slot::user_of(index, processes)? {
        return Ok(Some(Fate::Kept(Keeper::User(user))));
    }
    if pretend {
        return Ok(Some(Fate::Removed));
    }
    // A node that begins to make a slot of this number finds it taken.
    if owner.is_none() && !registry.claim(index)? {
        return Ok(None);
    }
    slot::remove(index)?;
    registry.release(index)?;
    Ok(Some(Fate::Removed))
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
    let claims = registry.claims()?;
    found.retain(|index| !claims.iter().any(|claim| claim.index == *index));
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
