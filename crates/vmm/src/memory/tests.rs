//! Layers are composed by content, mapped or flattened.

use std::os::unix::fs::FileExt;

use vm_memory::Bytes;

use super::*;

fn file(pages: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    for (page, byte) in pages.iter().enumerate() {
        file.write_all_at(&[*byte; PAGE as usize], page as u64 * PAGE)
            .unwrap();
    }
    file
}

fn segment(page: u64, source: Source) -> Segment {
    Segment {
        offset: page * PAGE,
        len: PAGE,
        source,
    }
}

fn bytes_of(memory: &Memory) -> Vec<u8> {
    (0..memory.bytes() / PAGE)
        .map(|page| memory.frozen(page * PAGE, 1)[0])
        .collect()
}

#[test]
fn layers_are_mapped_at_their_own_offsets() {
    let files = [file(&[1, 2, 3, 4]), file(&[11, 12, 13, 14])];
    let segments = [
        segment(0, Source::Layer(0)),
        segment(1, Source::Layer(1)),
        segment(2, Source::Zero),
        segment(3, Source::Layer(0)),
    ];
    let memory = Memory::layered(4 * PAGE, &segments, &files).unwrap();
    assert_eq!(bytes_of(&memory), [1, 12, 0, 4]);
    memory.guest().write_slice(&[99], GuestAddress(0)).unwrap();
    let mut byte = [0];
    files[0].read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1], "what the guest writes stays private");
}

#[test]
fn scattered_layers_are_flattened_to_the_same_content() {
    let pages = 4 * MAPPED_PIECES_MAX as u64;
    let low: Vec<u8> = (0..pages).map(|page| (page % 251) as u8).collect();
    let high: Vec<u8> = (0..pages).map(|page| (page % 241) as u8).collect();
    let segments: Vec<Segment> = (0..pages)
        .map(|page| segment(page, Source::Layer(page as usize % 2)))
        .collect();
    let memory = Memory::layered(pages * PAGE, &segments, &[file(&low), file(&high)]).unwrap();
    let expected: Vec<u8> = (0..pages as usize)
        .map(|page| if page % 2 == 0 { low[page] } else { high[page] })
        .collect();
    assert_eq!(bytes_of(&memory), expected);
}

#[test]
fn what_is_scattered_is_copied_and_the_rest_is_mapped() {
    let short = 4 * MAPPED_PIECES_MAX as u64;
    let long = 1000;
    let pages = short + 2 * long;
    let bytes: Vec<u8> = (0..pages).map(|page| 1 + (page % 250) as u8).collect();
    let mut segments = vec![Segment {
        offset: 0,
        len: long * PAGE,
        source: Source::Layer(0),
    }];
    let scattered = long..long + short;
    segments.extend(scattered.clone().map(|page| match page % 3 {
        0 => segment(page, Source::Zero),
        other => segment(page, Source::Layer(other as usize - 1)),
    }));
    segments.push(Segment {
        offset: (long + short) * PAGE,
        len: long * PAGE,
        source: Source::Layer(1),
    });
    let files = [file(&bytes), file(&bytes)];
    let memory = Memory::layered(pages * PAGE, &segments, &files).unwrap();
    let expected: Vec<u8> = (0..pages)
        .map(|page| match scattered.contains(&page) && page % 3 == 0 {
            true => 0,
            false => bytes[page as usize],
        })
        .collect();
    assert_eq!(bytes_of(&memory), expected);
    // What is mapped comes from the file itself.
    files[0].write_all_at(&[99], 0).unwrap();
    files[1].write_all_at(&[98], (pages - 1) * PAGE).unwrap();
    let seen = bytes_of(&memory);
    assert_eq!((seen[0], seen[pages as usize - 1]), (99, 98));
}

#[test]
fn a_short_memory_file_is_refused_before_anybody_touches_it() {
    let refused = Memory::layered(4 * PAGE, &[segment(3, Source::Layer(0))], &[file(&[1])]);
    assert!(matches!(
        refused,
        Err(Error::Short {
            layer: 0,
            found: 4096,
            needed: 16384
        })
    ));
}

#[test]
fn impossible_sizes_are_refused() {
    assert!(matches!(Memory::anonymous(0), Err(Error::Size(0))));
    assert!(matches!(
        Memory::anonymous(300_000),
        Err(Error::Size(300_000))
    ));
    assert!(matches!(Memory::reserve(1 << 50), Err(Error::Map { .. })));
}

#[test]
fn memory_beyond_three_gibibytes_continues_at_four() {
    assert_eq!(regions(2 << 30), [(0, 0, 2 << 30)]);
    assert_eq!(
        regions(5 << 30),
        [(0, 0, 3 << 30), (4 << 30, 3 << 30, 2 << 30)]
    );
}
