//! Composition against a model that paints pages one by one.

use forkd_wire::layer::{Builder, PAGE_SIZE};
use proptest::prelude::*;

use super::*;

const PAGES: u64 = 64;

fn index(pages: &[Option<Kind>]) -> Index {
    let mut builder = Builder::new(PAGES * PAGE_SIZE).unwrap();
    for (page, kind) in pages.iter().enumerate() {
        if let Some(kind) = kind {
            builder
                .push(page as u64 * PAGE_SIZE, PAGE_SIZE, *kind)
                .unwrap();
        }
    }
    builder.finish()
}

fn painted(layers: &[Vec<Option<Kind>>]) -> Vec<Source> {
    let mut pages = vec![Source::Zero; PAGES as usize];
    for (layer, kinds) in layers.iter().enumerate() {
        for (page, kind) in kinds.iter().enumerate() {
            match kind {
                Some(Kind::Data) => pages[page] = Source::Layer(layer),
                Some(Kind::Zero) => pages[page] = Source::Zero,
                None => {}
            }
        }
    }
    pages
}

fn kinds() -> impl Strategy<Value = Vec<Option<Kind>>> {
    let kind = prop_oneof![Just(None), Just(Some(Kind::Data)), Just(Some(Kind::Zero))];
    // Runs, so that extents overlap in interesting ways.
    prop::collection::vec((kind, 1..9usize), 64).prop_map(|runs| {
        let pages = runs
            .into_iter()
            .flat_map(|(kind, len)| std::iter::repeat_n(kind, len));
        pages.take(PAGES as usize).collect()
    })
}

proptest! {
    #[test]
    fn composing_equals_painting(layers in prop::collection::vec(kinds(), 1..6)) {
        let indexes: Vec<Index> = layers.iter().map(|pages| index(pages)).collect();
        let segments = compose(&indexes).unwrap();
        let mut pages = Vec::new();
        for segment in &segments {
            prop_assert_eq!(segment.offset, pages.len() as u64 * PAGE_SIZE);
            pages.extend((0..segment.len / PAGE_SIZE).map(|_| segment.source));
        }
        prop_assert_eq!(pages, painted(&layers));
        prop_assert!(segments.windows(2).all(|pair| pair[0].source != pair[1].source));
    }
}

#[test]
fn layers_of_other_sizes_are_refused() {
    assert_eq!(compose(&[]), Err(Error::None));
    let small = Builder::new(PAGE_SIZE).unwrap().finish();
    let large = Builder::new(2 * PAGE_SIZE).unwrap().finish();
    let expected = Error::Size {
        layer: 1,
        found: 2 * PAGE_SIZE,
        expected: PAGE_SIZE,
    };
    assert_eq!(compose(&[small, large]), Err(expected));
}
