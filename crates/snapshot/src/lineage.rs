//! Which snapshot lies over which: chains, dependents, and what may be freed. Pure: it sees
//! identities, never files.

use std::collections::{BTreeMap, BTreeSet};

/// The most snapshots in a chain, base and head included. Applying a layer costs time when a template
/// is made, and a chain without end is a cycle.
pub const DEPTH_MAX: usize = 64;

/// Why there is no chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A snapshot lies over itself.
    #[error("the layers form a cycle")]
    Cycle,
    /// Too many layers.
    #[error("more than {DEPTH_MAX} layers lie over each other; flatten one of them")]
    TooDeep,
}

/// Walks from a head down to its base; `below` says what a node lies over. Answers base first.
pub fn chain<N, E>(head: N, mut below: impl FnMut(&N) -> Result<Option<N>, E>) -> Result<Vec<N>, E>
where
    N: PartialEq,
    E: From<Error>,
{
    let mut nodes = vec![head];
    // At most DEPTH_MAX rounds.
    while let Some(next) = below(&nodes[nodes.len() - 1])? {
        if nodes.contains(&next) {
            return Err(Error::Cycle.into());
        }
        if nodes.len() == DEPTH_MAX {
            return Err(Error::TooDeep.into());
        }
        nodes.push(next);
    }
    nodes.reverse();
    Ok(nodes)
}

/// A forest: every node lies over at most one other. What a node lies over need not be known.
#[derive(Debug, Clone)]
pub struct Graph<N: Ord> {
    below: BTreeMap<N, Option<N>>,
}

impl<N: Ord + Clone> Graph<N> {
    /// From nodes and what each lies over.
    pub fn new(nodes: impl IntoIterator<Item = (N, Option<N>)>) -> Graph<N> {
        Graph {
            below: nodes.into_iter().collect(),
        }
    }

    /// What lies over a node, directly or not; every node comes after all that lie over it, so this
    /// is an order to remove them in.
    pub fn dependents(&self, node: &N) -> Vec<N> {
        let mut levels: Vec<N> = Vec::new();
        let mut seen = BTreeSet::from([node]);
        let mut level = vec![node];
        while !level.is_empty() {
            let over_level = self.below.iter().filter(|(_, below)| {
                let below = below.as_ref();
                below.is_some_and(|below| level.contains(&below))
            });
            let next = over_level.map(|(node, _)| node);
            let next: Vec<&N> = next.filter(|node| seen.insert(*node)).collect();
            levels.extend(next.iter().map(|node| (*node).clone()));
            level = next;
        }
        levels.reverse();
        levels
    }

    /// The nodes that `roots` need: themselves and everything below them.
    pub fn needed<'a>(&'a self, roots: impl IntoIterator<Item = &'a N>) -> BTreeSet<N> {
        let mut needed = BTreeSet::new();
        for root in roots {
            let mut at = Some(root);
            while let Some(node) = at {
                // Seen before: everything below has been, too. This also ends a cycle.
                if !needed.insert(node.clone()) {
                    break;
                }
                at = self.below.get(node).and_then(Option::as_ref);
            }
        }
        needed
    }

    /// The nodes that nothing in `roots` needs, in an order to remove them in.
    pub fn garbage<'a>(&'a self, roots: impl IntoIterator<Item = &'a N>) -> Vec<N> {
        let needed = self.needed(roots);
        let mut garbage = Vec::new();
        for node in self.below.keys() {
            if needed.contains(node) || garbage.contains(node) {
                continue;
            }
            for over in self.dependents(node) {
                if !garbage.contains(&over) {
                    garbage.push(over);
                }
            }
            garbage.push(node.clone());
        }
        garbage
    }
}

#[cfg(test)]
mod tests;
