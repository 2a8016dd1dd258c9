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

/// Memory of which some pages come from a file, and some are written, far apart and side by side.
fn patchwork(mib: u64) -> Memory {
    use vm_memory::{Bytes, GuestAddress};
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; 64 * PAGE], 0).unwrap();
    let segment = Segment {
        offset: 0,
        len: 64 * PAGE_SIZE,
        source: Source::Layer(0),
    };
    let memory = Memory::layered(mib << 20, &[segment], &[file]).unwrap();
    let guest = memory.guest();
    for page in (0..600).filter(|page| page % 7 < 3 || (200..300).contains(page)) {
        let at = GuestAddress(page * PAGE_SIZE);
        guest.write_slice(&[page as u8, 1], at).unwrap();
    }
    // Reading alone makes no page a process's own.
    let mut byte = [0];
    for page in 0..900 {
        let at = GuestAddress(page * PAGE_SIZE);
        guest.read_slice(&mut byte, at).unwrap();
    }
    memory
}

#[test]
fn an_older_kernels_page_map_leaves_out_nothing() {
    let memory = patchwork(8);
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let written = |page: u64| page < 600 && (page % 7 < 3 || (200..300).contains(&page));
    let holds = |ranges: &[(u64, u64)], page: u64| {
        let at = page * PAGE_SIZE;
        ranges
            .iter()
            .any(|(start, len)| (*start..start + len).contains(&at))
    };
    let entries = pages::read_entries(&memory, &pagemap).unwrap();
    for page in 0..memory.bytes() / PAGE_SIZE {
        // It cannot tell the shared page of zeroes from an own one: such pages are indexed as zero.
        let zero = memory
            .frozen(page * PAGE_SIZE, PAGE_SIZE)
            .iter()
            .all(|byte| *byte == 0);
        let found = holds(&entries, page);
        assert!(found == written(page) || (found && zero), "page {page}");
    }
    match pages::scan(&memory, &pagemap) {
        Ok(scanned) => {
            for page in 0..memory.bytes() / PAGE_SIZE {
                assert_eq!(holds(&scanned, page), written(page), "page {page}");
            }
        }
        Err(error) => println!("skipped: this kernel has no PAGEMAP_SCAN: {error}"),
    }
}

#[test]
fn pages_on_both_sides_of_the_device_hole_are_where_they_belong() {
    use crate::memory::{HIGH_RAM, LOW_RAM_END};
    use vm_memory::{Bytes, GuestAddress};
    let memory = Memory::anonymous(3 * 1024 + 8).unwrap();
    let guest = memory.guest();
    let last = (8 << 20) - PAGE_SIZE;
    for at in [LOW_RAM_END - PAGE_SIZE, HIGH_RAM, HIGH_RAM + last] {
        guest
            .write_slice(&at.to_le_bytes(), GuestAddress(at))
            .unwrap();
    }
    // No memory in the hole and beyond the end.
    for at in [LOW_RAM_END, HIGH_RAM - PAGE_SIZE, HIGH_RAM + (8 << 20)] {
        assert!(guest.write_slice(&[1], GuestAddress(at)).is_err());
    }
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let expected = [
        (LOW_RAM_END - PAGE_SIZE, 2 * PAGE_SIZE),
        (LOW_RAM_END + last, PAGE_SIZE),
    ];
    assert_eq!(pages::own(&memory, None).unwrap(), expected);
    assert_eq!(pages::read_entries(&memory, &pagemap).unwrap(), expected);
    let bytes = memory.frozen(LOW_RAM_END, 8);
    assert_eq!(bytes, HIGH_RAM.to_le_bytes());
}

#[test]
fn many_pages_apart_from_each_other_are_each_found_once() {
    // The kernel is asked for 1024 runs at a time and looks for 512.
    for pages in [511, 513, 1023, 1025, 1600, 2049, 3000] {
        let memory = Memory::anonymous(64).unwrap();
        let expected: Vec<_> = (0..pages)
            .map(|page| (2 * page * PAGE_SIZE, PAGE_SIZE))
            .collect();
        for (offset, _) in &expected {
            let at = vm_memory::GuestAddress(*offset);
            vm_memory::Bytes::write_slice(memory.guest(), &[1], at).unwrap();
        }
        assert!(pages::own(&memory, None).unwrap() == expected, "{pages}");
    }
}
