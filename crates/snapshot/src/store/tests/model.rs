//! Random sequences of operations against a model that keeps whole memories in vectors.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Op {
    Full {
        name: u8,
        pages: Vec<(u64, u8)>,
    },
    Layer {
        name: u8,
        over: u8,
        pages: BTreeMap<u64, Option<u8>>,
    },
    Remove {
        name: u8,
        dependents: Dependents,
    },
    Flatten {
        name: u8,
        to: u8,
    },
    Reopen,
}

#[derive(Debug, Clone)]
struct Node {
    /// `None`: it has lost its tag.
    name: Option<u8>,
    over: Option<usize>,
    memory: Vec<u8>,
}

/// The obvious store: nodes are never freed, only unnamed.
#[derive(Debug, Default)]
struct Model {
    nodes: Vec<Node>,
}

impl Model {
    fn named(&self, name: u8) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == Some(name))
    }

    fn add(&mut self, name: u8, over: Option<usize>, memory: Vec<u8>) {
        let name = Some(name);
        self.nodes.push(Node { name, over, memory });
    }

    fn needs(&self, node: usize, other: usize) -> bool {
        let below = self.nodes[node].over;
        node == other || below.is_some_and(|below| self.needs(below, other))
    }

    /// Whether something with a tag needs the node.
    fn is_live(&self, node: usize) -> bool {
        let mut tagged = (0..self.nodes.len()).filter(|node| self.nodes[*node].name.is_some());
        tagged.any(|tagged| self.needs(tagged, node))
    }

    fn live(&self) -> usize {
        let nodes = 0..self.nodes.len();
        nodes.filter(|node| self.is_live(*node)).count()
    }

    fn remove(&mut self, node: usize, dependents: Dependents) -> bool {
        let nodes = 0..self.nodes.len();
        let over = nodes.filter(|other| *other != node && self.needs(*other, node));
        let over: Vec<usize> = over.filter(|other| self.is_live(*other)).collect();
        if dependents == Dependents::Refuse && !over.is_empty() {
            return false;
        }
        self.nodes[node].name = None;
        if dependents == Dependents::Cascade {
            for node in over {
                self.nodes[node].name = None;
            }
        }
        true
    }
}

fn ops() -> impl Strategy<Value = Op> {
    let name = 0u8..5;
    let page = 0..PAGES;
    let full = prop::collection::vec((page.clone(), any::<u8>()), 0..4);
    let layer = prop::collection::btree_map(page, any::<Option<u8>>(), 0..4);
    let dependents = prop_oneof![
        1 => Just(Dependents::Refuse),
        1 => Just(Dependents::Cascade),
        3 => Just(Dependents::Detach),
    ];
    prop_oneof![
        2 => (name.clone(), full).prop_map(|(name, pages)| Op::Full { name, pages }),
        4 => (name.clone(), name.clone(), layer)
            .prop_map(|(name, over, pages)| Op::Layer { name, over, pages }),
        3 => (name.clone(), dependents)
            .prop_map(|(name, dependents)| Op::Remove { name, dependents }),
        1 => (name.clone(), name).prop_map(|(name, to)| Op::Flatten { name, to }),
        1 => Just(Op::Reopen),
    ]
}

fn named(name: u8) -> Tag {
    tag(&format!("t{name}"))
}

fn fill(memory: &mut [u8], page: u64, byte: u8) {
    memory[page as usize * PAGE..][..PAGE].fill(byte);
}

/// Performs one operation on both; they must agree on whether it is possible.
fn step(world: &World, model: &mut Model, op: Op) {
    match op {
        Op::Full { name, pages } => {
            let begun = world.store.begin(&named(name));
            assert_eq!(begun.is_ok(), model.named(name).is_none());
            let Ok(draft) = begun else { return };
            write_full(&draft, &pages);
            draft.publish(about(MemoryDraft::Full)).unwrap();
            let mut memory = vec![0; MEMORY_BYTES as usize];
            for (page, byte) in pages {
                fill(&mut memory, page, byte);
            }
            model.add(name, None, memory);
        }
        Op::Layer { name, over, pages } => {
            let (None, Some(below)) = (model.named(name), model.named(over)) else {
                return;
            };
            let over = world.store.get(&named(over)).unwrap();
            let mut memory = model.nodes[below].memory.clone();
            for (page, byte) in &pages {
                fill(&mut memory, *page, byte.unwrap_or(0));
            }
            let pages: Vec<_> = pages.into_iter().collect();
            world.layer(named(name).as_str(), &over, &pages);
            model.add(name, Some(below), memory);
        }
        Op::Remove { name, dependents } => {
            let node = model.named(name);
            let possible = node.is_some_and(|node| model.remove(node, dependents));
            let removed = world.store.remove(&named(name), dependents);
            assert_eq!(removed.is_ok(), possible, "{removed:?}");
        }
        Op::Flatten { name, to } => {
            let (Some(node), None) = (model.named(name), model.named(to)) else {
                return;
            };
            world.store.flatten(&named(name), &named(to)).unwrap();
            let memory = model.nodes[node].memory.clone();
            model.add(to, None, memory);
        }
        Op::Reopen => drop(Store::open(world.store.root()).unwrap()),
    }
}

/// What a template would map.
fn content(world: &World, tag: &Tag) -> Vec<u8> {
    let files = world.store.files(tag).unwrap();
    let memory = tempfile::tempfile().unwrap();
    sparse::copy(&fs::File::open(files.memory).unwrap(), &memory).unwrap();
    for layer in files.layers {
        let index = crate::check::read_index(&layer.index, MEMORY_BYTES).unwrap();
        sparse::apply_layer(&memory, &fs::File::open(layer.memory).unwrap(), &index).unwrap();
    }
    let mut bytes = vec![0; MEMORY_BYTES as usize];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_store_agrees_with_the_model(ops in prop::collection::vec(ops(), 1..25)) {
        let world = world();
        let mut model = Model::default();
        for op in ops {
            step(&world, &mut model, op);
            prop_assert_eq!(world.left().len(), model.live(), "{:?}", world.left());
        }
        for node in &model.nodes {
            let Some(name) = node.name else { continue };
            prop_assert!(content(&world, &named(name)) == node.memory, "t{}", name);
            world.store.verify(&named(name)).unwrap();
        }
    }
}
