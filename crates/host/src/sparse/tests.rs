//! Real files on the file system at hand, compared by content with plain vectors.

use forkd_wire::layer::Builder;
use proptest::prelude::*;

use super::*;

const PAGE: usize = PAGE_SIZE as usize;
const PAGES: usize = 160;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn file_with(bytes: &[u8]) -> File {
    let file = file();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; size(file).unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn sparse_with(size: u64, pages: &[u64]) -> File {
    let file = file();
    file.set_len(size).unwrap();
    for page in pages {
        file.write_all_at(&[*page as u8 + 1; PAGE], page * PAGE_SIZE)
            .unwrap();
    }
    file
}

#[test]
fn walks_data_and_skips_holes() {
    let file = sparse_with(PAGE_SIZE * 1000, &[0, 500, 501, 999]);
    let ranges: Vec<_> = data_ranges(&file).unwrap().map(Result::unwrap).collect();
    let page = |from: u64, to: u64| from * PAGE_SIZE..to * PAGE_SIZE;
    assert_eq!(ranges, [page(0, 1), page(500, 502), page(999, 1000)]);
}

#[test]
fn nothing_but_a_hole_has_no_data() {
    for size in [0, 1, PAGE_SIZE * 9 + 5] {
        let file = sparse_with(size, &[]);
        assert_eq!(data_ranges(&file).unwrap().count(), 0);
        assert_eq!(allocated_bytes(&file).unwrap(), 0);
    }
}

#[test]
fn copies_content_and_drops_zero_pages() {
    let mut bytes = vec![7; PAGE * 300 + 123];
    bytes[PAGE * 10..PAGE * 200].fill(0);
    let (from, to) = (file_with(&bytes), file_with(&[9; PAGE * 400]));
    let copied = copy(&from, &to).unwrap();
    assert!(contents(&to) == bytes);
    if let Copied::Written(written) = copied {
        assert_eq!(written, (PAGE * 110 + 123) as u64);
        assert!(allocated_bytes(&to).unwrap() < allocated_bytes(&from).unwrap());
    }
}

#[test]
fn frees_zero_pages_in_place() {
    let mut bytes = vec![0; PAGE * 300 + 17];
    bytes[PAGE * 7 + 1] = 1;
    let file = file_with(&bytes);
    let before = allocated_bytes(&file).unwrap();
    let freed = punch_zero_pages(&file).unwrap();
    assert_eq!(freed, PAGE_SIZE * 299);
    assert!(allocated_bytes(&file).unwrap() < before / 10);
    assert!(contents(&file) == bytes);
}

#[test]
fn a_layer_of_another_size_is_refused() {
    let index = Builder::new(PAGE_SIZE * 4).unwrap().finish();
    let (right, wrong) = (
        sparse_with(PAGE_SIZE * 4, &[]),
        sparse_with(PAGE_SIZE * 5, &[]),
    );
    let refused = apply_layer(&wrong, &right, &index).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "base has 20480 bytes, its layer index describes 16384 bytes of memory"
    );
    assert!(apply_layer(&right, &wrong, &index).is_err());
    apply_layer(&right, &right, &index).unwrap();
}

#[test]
fn wrong_descriptors_are_errors_not_panics() {
    let read_only = File::open("/dev/null").unwrap();
    assert!(clear(&read_only, 0..PAGE_SIZE).is_err());
    assert!(resize(&read_only, 4096).is_err());
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    pipe.metadata().unwrap();
    assert!(copy(&file_with(b"x"), &pipe).is_err());
}

/// What happens to one page in a layer.
#[derive(Debug, Clone, Copy)]
enum Change {
    Keep,
    Zero,
    Fill(u8),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        4 => Just(Change::Keep),
        1 => Just(Change::Zero),
        2 => any::<u8>().prop_map(Change::Fill),
    ];
    prop::collection::vec(change, PAGES)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn layers_applied_in_order_equal_the_model(layers in prop::collection::vec(changes(), 1..4)) {
        let memory = PAGE_SIZE * PAGES as u64;
        let base = sparse_with(memory, &[0, 1, 2, 50, 99]);
        let mut model = contents(&base);
        for changes in layers {
            let layer = sparse_with(memory, &[]);
            let mut builder = Builder::new(memory).unwrap();
            for (page, change) in changes.into_iter().enumerate() {
                let offset = page as u64 * PAGE_SIZE;
                let kind = match change {
                    Change::Keep => continue,
                    Change::Zero => Kind::Zero,
                    Change::Fill(byte) => {
                        layer.write_all_at(&[byte; PAGE], offset).unwrap();
                        Kind::Data
                    }
                };
                builder.push(offset, PAGE_SIZE, kind).unwrap();
                let filled = if let Change::Fill(byte) = change { byte } else { 0 };
                model[page * PAGE..][..PAGE].fill(filled);
            }
            apply_layer(&base, &layer, &builder.finish()).unwrap();
            prop_assert!(contents(&base) == model);
        }
        punch_zero_pages(&base).unwrap();
        let copied = file();
        copy(&base, &copied).unwrap();
        prop_assert!(contents(&base) == model && contents(&copied) == model);
    }
}
