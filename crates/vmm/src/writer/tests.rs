//! Zero runs and unions, and a page map read both ways.

use forkd_wire::layer::Index;

use super::*;
use crate::layers::{Segment, Source};

const PAGE: usize = PAGE_SIZE as usize;

#[test]
fn runs_tell_zero_from_data() {
    let mut bytes = vec![0; 5 * PAGE];
    bytes[PAGE + 4095] = 1;
    bytes[2 * PAGE] = 1;
    let expected = [
        (0, PAGE, Kind::Zero),
        (PAGE, 2 * PAGE, Kind::Data),
        (3 * PAGE, 2 * PAGE, Kind::Zero),
    ];
    assert_eq!(pages::runs(&bytes), expected);
}

#[test]
fn unions_join_what_overlaps_or_touches() {
    let union = pages::union(
        vec![(0, 10), (50, 5)],
        &[(5, 10), (15, 5), (52, 1), (80, 1)],
    );
    assert_eq!(union, [(0, 20), (50, 5), (80, 1)]);
}

#[test]
fn only_written_pages_are_own() {
    use vm_memory::{Bytes, GuestAddress};
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; 8 * PAGE], 0).unwrap();
    let segment = Segment {
        offset: 0,
        len: 8 * PAGE_SIZE,
        source: Source::Layer(0),
    };
    let memory = Memory::layered(8 * PAGE_SIZE, &[segment], &[file]).unwrap();
    memory
        .guest()
        .write_slice(&[1], GuestAddress(3 * PAGE_SIZE))
        .unwrap();
    let mut byte = [0];
    memory
        .guest()
        .read_slice(&mut byte, GuestAddress(5 * PAGE_SIZE))
        .unwrap();
    assert_eq!(
        pages::own(&memory, None).unwrap(),
        [(3 * PAGE_SIZE, PAGE_SIZE)]
    );

    let out = tempfile::tempfile().unwrap();
    let mut builder = Builder::new(memory.bytes()).unwrap();
    write_range(
        &memory,
        &out,
        3 * PAGE_SIZE,
        PAGE_SIZE,
        Scope::Own,
        &mut builder,
    )
    .unwrap();
    let index = Index::decode(&builder.finish().encode()).unwrap();
    assert_eq!(index.data_bytes(), PAGE_SIZE);
}
