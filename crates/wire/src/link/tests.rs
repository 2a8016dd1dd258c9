//! Frames survive any split of the stream, and noise before them.

use proptest::prelude::*;

use super::*;

/// What a decoder makes of `bytes`, fed in pieces that end at `cuts`.
fn decode_all(bytes: &[u8], cuts: &[usize]) -> Vec<(u64, Kind, Vec<u8>)> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    let mut ends: Vec<_> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    ends.push(bytes.len());
    ends.sort_unstable();
    let mut start = 0;
    for end in ends {
        let mut piece = &bytes[start..end];
        while let Some(frame) = decoder.next(&mut piece) {
            frames.push((frame.id, frame.kind, frame.payload.to_vec()));
        }
        assert!(piece.is_empty());
        start = end;
    }
    frames
}

fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let byte = prop_oneof![Just(0u8), any::<u8>()];
    let dense = prop::collection::vec(byte, 0..700);
    let long = (1usize..=MAX_PAYLOAD, any::<u8>()).prop_map(|(len, fill)| vec![fill; len]);
    prop::collection::vec(prop_oneof![dense, long], 0..6)
}

proptest! {
    #[test]
    fn every_split_gives_the_same_frames(
        id: u64,
        payloads in payloads(),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        let encoder = Encoder::new(id);
        let mut bytes = Vec::new();
        encoder.open(&mut bytes);
        for payload in &payloads {
            prop_assert_eq!(encoder.data(payload, &mut bytes), payload.len());
        }
        encoder.close(&mut bytes);
        let mut expected = vec![(id, Kind::Open, vec![])];
        expected.extend(payloads.into_iter().map(|payload| (id, Kind::Data, payload)));
        expected.push((id, Kind::Close, vec![]));
        prop_assert_eq!(decode_all(&bytes, &cuts), expected);
    }

    #[test]
    fn an_open_is_found_after_any_garbage(
        garbage in prop::collection::vec(any::<u8>(), 0..20_000),
        id: u64,
        payload in prop::collection::vec(any::<u8>(), 0..300),
        cuts in prop::collection::vec(any::<usize>(), 0..8),
    ) {
        let mut bytes = garbage;
        let encoder = Encoder::new(id);
        encoder.open(&mut bytes);
        encoder.data(&payload, &mut bytes);
        let frames = decode_all(&bytes, &cuts);
        let ours: Vec<_> = frames.into_iter().filter(|frame| frame.0 == id).collect();
        prop_assert_eq!(ours, vec![(id, Kind::Open, vec![]), (id, Kind::Data, payload)]);
    }

    #[test]
    fn a_frame_cut_off_anywhere_costs_only_itself(
        old in prop::collection::vec(any::<u8>(), 0..1000),
        cut: usize,
        skip: usize,
    ) {
        let mut first = Vec::new();
        Encoder::new(1).data(&old, &mut first);
        // The peer changes in mid-frame: what is left of the old one is any inner piece of it.
        let cut = cut % first.len();
        let skip = skip % (cut + 1);
        let mut bytes = first[skip..cut].to_vec();
        Encoder::new(2).open(&mut bytes);
        Encoder::new(2).data(b"after", &mut bytes);
        let frames: Vec<_> = decode_all(&bytes, &[]).into_iter().filter(|f| f.0 == 2).collect();
        prop_assert_eq!(frames, vec![(2, Kind::Open, vec![]), (2, Kind::Data, b"after".to_vec())]);
    }

    #[test]
    fn a_changed_byte_never_passes_for_a_frame(
        payload in prop::collection::vec(any::<u8>(), 0..600),
        at: usize,
        change in 1u8..,
    ) {
        let mut bytes = Vec::new();
        Encoder::new(7).data(&payload, &mut bytes);
        let at = at % (bytes.len() - 1);
        bytes[at] ^= change;
        prop_assert_eq!(decode_all(&bytes, &[]), vec![]);
    }
}

#[test]
fn long_input_is_taken_in_frames() {
    let input = vec![0; MAX_PAYLOAD * 2 + 5];
    let encoder = Encoder::new(3);
    let (mut rest, mut bytes) = (&input[..], Vec::new());
    while !rest.is_empty() {
        rest = &rest[encoder.data(rest, &mut bytes)..];
    }
    let frames = decode_all(&bytes, &[]);
    assert_eq!(frames.len(), 3);
    assert_eq!(
        frames.iter().map(|frame| frame.2.len()).sum::<usize>(),
        input.len()
    );
}

#[test]
fn a_frame_never_exceeds_its_bound() {
    for fill in [0, 1] {
        let mut bytes = Vec::new();
        Encoder::new(u64::MAX).data(&[fill; MAX_PAYLOAD], &mut bytes);
        assert!(bytes.len() <= MAX_FRAME, "{} bytes", bytes.len());
    }
}

#[test]
fn endless_garbage_is_not_kept() {
    let mut decoder = Decoder::new();
    for _ in 0..1000 {
        let mut piece: &[u8] = &[0x55; 4096];
        assert_eq!(decoder.next(&mut piece), None);
    }
    assert!(decoder.buf.capacity() <= 2 * MAX_ENCODED);
    let mut bytes = Vec::new();
    Encoder::new(9).open(&mut bytes);
    assert_eq!(decoder.next(&mut &bytes[..]).map(|frame| frame.id), Some(9));
    assert_eq!(decoder.damaged(), 1);
}
