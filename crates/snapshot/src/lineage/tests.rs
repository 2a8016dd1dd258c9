//! Random forests against slow, obvious definitions.

use proptest::prelude::*;

use super::*;

type Forest = BTreeMap<u8, Option<u8>>;

/// Nodes that lie over earlier ones or nothing; a few lie over something unknown.
fn forests() -> impl Strategy<Value = Forest> {
    let below = prop_oneof![2 => Just(None), 5 => (0u8..12).prop_map(Some)];
    prop::collection::vec(below, 0..12).prop_map(|belows| {
        let nodes = (0u8..).zip(belows);
        nodes
            .map(|(node, below)| match below {
                Some(below) if below >= node => (node, (below == 11).then_some(200)),
                below => (node, below),
            })
            .collect()
    })
}

fn chain_of(forest: &Forest, node: u8) -> Result<Vec<u8>, Error> {
    chain(node, |node| Ok(forest.get(node).copied().flatten()))
}

/// The definition: a node needs whatever is in its chain.
fn needs(forest: &Forest, node: u8, other: u8) -> bool {
    chain_of(forest, node).unwrap().contains(&other)
}

#[test]
fn chains_end_at_cycles_and_at_the_cap() {
    let ring = Forest::from([(1, Some(2)), (2, Some(3)), (3, Some(1))]);
    assert_eq!(chain_of(&ring, 1), Err(Error::Cycle));
    let own = Forest::from([(1, Some(1))]);
    assert_eq!(chain_of(&own, 1), Err(Error::Cycle));
    let long: Forest = (0..100)
        .map(|node: u8| (node, node.checked_sub(1)))
        .collect();
    assert_eq!(chain_of(&long, 63).unwrap().len(), DEPTH_MAX);
    assert_eq!(chain_of(&long, 64), Err(Error::TooDeep));
}

#[test]
fn cycles_do_not_hang_the_graph() {
    let graph = Graph::new([(1, Some(2)), (2, Some(1)), (3, Some(1))]);
    assert_eq!(graph.needed([&3]), BTreeSet::from([1, 2, 3]));
    assert_eq!(graph.dependents(&1), [3, 2]);
    assert_eq!(graph.garbage([]).len(), 3);
}

proptest! {
    #[test]
    fn chains_run_from_base_to_head(forest in forests(), head in 0u8..12) {
        let chain = chain_of(&forest, head).unwrap();
        prop_assert_eq!(chain.last(), Some(&head));
        prop_assert!(forest.get(&chain[0]).copied().flatten().is_none());
        for pair in chain.windows(2) {
            prop_assert_eq!(forest[&pair[1]], Some(pair[0]));
        }
    }

    #[test]
    fn dependents_are_all_that_need_a_node_outermost_first(forest in forests(), node in 0u8..12) {
        let dependents = Graph::new(forest.clone()).dependents(&node);
        let found: BTreeSet<u8> = dependents.iter().copied().collect();
        let expected = forest.keys().copied().filter(|other| *other != node);
        let expected: BTreeSet<u8> = expected.filter(|other| needs(&forest, *other, node)).collect();
        prop_assert_eq!(&found, &expected);
        prop_assert_eq!(found.len(), dependents.len());
        prop_assert!(removable_in_order(&forest, &dependents));
    }

    #[test]
    fn garbage_is_exactly_what_no_root_needs(forest in forests(), roots in prop::collection::btree_set(0u8..12, 0..5)) {
        let garbage = Graph::new(forest.clone()).garbage(&roots);
        let found: BTreeSet<u8> = garbage.iter().copied().collect();
        let needed = |node: &u8| roots.iter().any(|root| needs(&forest, *root, *node));
        let expected: BTreeSet<u8> = forest.keys().copied().filter(|node| !needed(node)).collect();
        prop_assert_eq!(found.len(), garbage.len());
        prop_assert_eq!(found, expected);
        prop_assert!(removable_in_order(&forest, &garbage));
    }
}

/// Nothing is removed while something in the list still lies over it.
fn removable_in_order(forest: &Forest, order: &[u8]) -> bool {
    (0..order.len()).all(|at| {
        let later = &order[at + 1..];
        later.iter().all(|later| forest[later] != Some(order[at]))
    })
}
