//! Golden bytes, every refusal, and random indexes through the codec.

use proptest::prelude::*;

use super::*;

const MEMORY: u64 = 64 * PAGE_SIZE;

fn sample() -> Index {
    let mut builder = Builder::new(MEMORY).unwrap();
    builder.push(0, PAGE_SIZE, Kind::Data).unwrap();
    builder.push(PAGE_SIZE, PAGE_SIZE, Kind::Data).unwrap();
    builder.push(2 * PAGE_SIZE, PAGE_SIZE, Kind::Zero).unwrap();
    builder
        .push(9 * PAGE_SIZE, 3 * PAGE_SIZE, Kind::Zero)
        .unwrap();
    builder.finish()
}

/// Replaces bytes and makes the checksum right again, as an attacker would.
fn tampered(at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = sample().encode();
    let contents = bytes.len() - HASH_LEN;
    bytes.truncate(contents);
    bytes[at..at + with.len()].copy_from_slice(with);
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

#[test]
fn the_format_does_not_drift() {
    assert_eq!(
        (FORMAT_VERSION, PAGE_SIZE, MEMORY_BYTES_MAX),
        (1, 4096, 1 << 40)
    );
    assert_eq!((HEADER_LEN, EXTENT_LEN, HASH_LEN), (32, 24, 32));
    let mut expected = Vec::new();
    expected.extend_from_slice(b"FKDLAYER\x01\0\0\0\0\x10\0\0");
    expected.extend_from_slice(b"\0\0\x04\0\0\0\0\0\x03\0\0\0\0\0\0\0");
    for (offset, len, kind) in [
        (0u64, 0x2000u64, 0u64),
        (0x2000, 0x1000, 1),
        (0x9000, 0x3000, 1),
    ] {
        for number in [offset, len, kind] {
            expected.extend_from_slice(&number.to_le_bytes());
        }
    }
    let bytes = sample().encode();
    assert_eq!(bytes[..bytes.len() - HASH_LEN], expected);
}

#[test]
fn joins_what_touches_and_counts_bytes() {
    let index = sample();
    assert_eq!(index.extents().len(), 3);
    assert_eq!(index.data_bytes(), 2 * PAGE_SIZE);
    assert_eq!(index.zero_bytes(), 4 * PAGE_SIZE);
    assert_eq!(Index::decode(&index.encode()), Ok(index));
}

#[test]
fn builder_refuses_disorder_and_what_does_not_fit() {
    let mut builder = Builder::new(MEMORY).unwrap();
    builder.push(PAGE_SIZE, PAGE_SIZE, Kind::Data).unwrap();
    builder.push(MEMORY, 0, Kind::Data).unwrap();
    for (offset, len) in [
        (1, PAGE_SIZE),
        (PAGE_SIZE * 2, 5),
        (MEMORY, PAGE_SIZE),
        (!4095, 4096),
    ] {
        let refused = builder.push(offset, len, Kind::Data);
        assert!(
            matches!(refused, Err(Error::Extent { .. })),
            "{offset} {len}"
        );
    }
    let refused = builder.push(0, PAGE_SIZE, Kind::Zero);
    assert!(matches!(refused, Err(Error::Order { .. })));
    for memory in [0, 1, PAGE_SIZE + 1, MEMORY_BYTES_MAX + PAGE_SIZE] {
        let refused = Builder::new(memory).map(Builder::finish);
        assert_eq!(refused, Err(Error::MemorySize { found: memory }));
    }
}

#[test]
fn decoder_refuses_each_wrong_field() {
    let extent = |offset, len, kind| Error::Extent { offset, len, kind };
    let order = |offset, previous_end| Error::Order {
        offset,
        previous_end,
    };
    let cases: Vec<(Vec<u8>, Error)> = vec![
        (
            Vec::new(),
            Error::Length {
                expected: 64,
                found: 0,
            },
        ),
        (
            tampered(0, b"X"),
            Error::Magic {
                found: *b"XKDLAYER",
            },
        ),
        (tampered(8, &[2]), Error::Version { found: 2 }),
        (tampered(12, &[0, 0x40]), Error::PageSize { found: 0x4000 }),
        (tampered(16, &[1]), Error::MemorySize { found: MEMORY + 1 }),
        (
            tampered(24, &[200]),
            Error::Count {
                found: 200,
                pages: 64,
            },
        ),
        (
            tampered(24, &[4]),
            Error::Length {
                expected: 160,
                found: 136,
            },
        ),
        (tampered(32, &[1]), extent(1, 0x2000, 0)),
        (tampered(40, &[0, 0]), extent(0, 0, 0)),
        (tampered(48, &[2]), extent(0, 0x2000, 2)),
        (tampered(52, &[1]), extent(0, 0x2000, 0)),
        (tampered(82, &[4]), extent(0x49000, 0x3000, 1)),
        (tampered(57, &[0x10]), order(0x1000, 0x2000)),
        (tampered(81, &[0x30]), order(0x3000, 0x3000)),
    ];
    for (bytes, expected) in cases {
        assert_eq!(Index::decode(&bytes), Err(expected));
    }
}

#[test]
fn any_flipped_bit_and_any_cut_is_noticed() {
    let bytes = sample().encode();
    for at in 0..bytes.len() {
        assert!(Index::decode(&bytes[..at]).is_err(), "cut at {at}");
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        assert!(Index::decode(&flipped).is_err(), "flipped at {at}");
    }
}

/// Random runs over a small memory: (gap, length, zero?) in pages.
fn indexes() -> impl Strategy<Value = Index> {
    let runs = prop::collection::vec((0u64..3, 1u64..4, any::<bool>()), 0..12);
    runs.prop_map(|runs| {
        let mut builder = Builder::new(MEMORY).unwrap();
        let mut at = 0;
        for (gap, pages, zero) in runs {
            at += gap * PAGE_SIZE;
            let kind = if zero { Kind::Zero } else { Kind::Data };
            let _beyond_the_end = builder.push(at, pages * PAGE_SIZE, kind);
            at += pages * PAGE_SIZE;
        }
        builder.finish()
    })
}

proptest! {
    #[test]
    fn every_index_survives_the_round_trip(index in indexes()) {
        let bytes = index.encode();
        prop_assert!(bytes.len() as u64 <= Index::encoded_len_max(index.memory_bytes()));
        prop_assert_eq!(Index::decode(&bytes), Ok(index));
    }

    #[test]
    fn decoder_never_panics_and_accepts_only_its_own_bytes(
        head in any::<bool>(), body in prop::collection::vec(any::<u8>(), 0..200)
    ) {
        let mut bytes = if head { sample().encode()[..32].to_vec() } else { Vec::new() };
        bytes.extend_from_slice(&body);
        if let Ok(index) = Index::decode(&bytes) {
            prop_assert_eq!(index.encode(), bytes);
        }
    }
}
