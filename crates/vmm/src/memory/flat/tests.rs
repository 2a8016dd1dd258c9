//! Plans cover all of memory in few pieces, and copy no more than they must.

use proptest::prelude::*;

use super::*;

/// Segments of these lengths, in pages, of the layers in turn.
fn segments(lengths: &[u64]) -> Vec<Segment> {
    let mut offset = 0;
    let mut next = |(number, pages): (usize, &u64)| {
        let source = match number % 3 {
            2 => Source::Zero,
            layer => Source::Layer(layer),
        };
        let len = pages * PAGE;
        offset += len;
        Segment {
            offset: offset - len,
            len,
            source,
        }
    };
    lengths.iter().enumerate().map(&mut next).collect()
}

fn copied(pieces: &[Piece]) -> u64 {
    let copied = pieces.iter().filter(|piece| piece.from == From::Copy);
    copied.map(|piece| piece.len).sum()
}

#[test]
fn few_segments_stay_as_they_are() {
    let segments = segments(&[1; 64]);
    let pieces = plan(&segments, 64);
    assert_eq!(pieces.len(), 64);
    assert_eq!(copied(&pieces), 0);
}

#[test]
fn long_segments_are_not_copied_for_the_sake_of_short_ones() {
    let mut lengths = vec![100_000];
    lengths.extend([1; 1000]);
    lengths.extend([50_000, 70_000]);
    lengths.extend([2; 1000]);
    let pieces = plan(&segments(&lengths), 64);
    assert!(pieces.len() <= 65, "{}", pieces.len());
    assert!(copied(&pieces) <= 3000 * PAGE, "{}", copied(&pieces) / PAGE);
}

#[test]
fn one_page_in_two_is_one_copy() {
    let pieces = plan(&segments(&[1; 4096]), 64);
    assert_eq!(pieces.len(), 1);
    assert_eq!(copied(&pieces), 4096 * PAGE);
}

proptest! {
    #[test]
    fn a_plan_covers_memory_in_few_pieces(
        lengths in prop::collection::vec(1_u64..50, 1..300),
        max in 2_usize..80,
    ) {
        let segments = segments(&lengths);
        let pieces = plan(&segments, max);
        prop_assert!(pieces.len() <= max + 1);
        let mut at = 0;
        for piece in &pieces {
            prop_assert_eq!(piece.offset, at);
            at += piece.len;
            if let From::Source(source) = piece.from {
                let whole = Segment { offset: piece.offset, len: piece.len, source };
                prop_assert!(segments.contains(&whole));
            }
        }
        prop_assert_eq!(at, segments.iter().map(|segment| segment.len).sum::<u64>());
        // None that is copied is longer than one that is not.
        let is_kept = |segment: &Segment| {
            let piece = pieces.iter().find(|piece| piece.offset == segment.offset);
            piece.is_some_and(|piece| piece.from != From::Copy)
        };
        let (kept, gone): (Vec<&Segment>, Vec<&Segment>) =
            segments.iter().partition(|segment| is_kept(segment));
        let shortest = kept.iter().map(|segment| segment.len).min().unwrap_or(u64::MAX);
        prop_assert!(gone.iter().all(|segment| segment.len <= shortest));
    }
}
