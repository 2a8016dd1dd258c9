//! The bus finds the right device, and nothing else.

use super::*;

#[derive(Default)]
struct Register(Vec<(u64, Vec<u8>)>);

impl BusDevice for Register {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.push((offset, data.to_vec()));
    }
}

fn device() -> Shared<Register> {
    Arc::new(Mutex::new(Register::default()))
}

#[test]
fn accesses_reach_the_device_that_claims_them() {
    let (low, high) = (device(), device());
    let mut bus = Bus::default();
    bus.insert(
        Range {
            base: 0x2000,
            len: 0x10,
        },
        high.clone(),
    )
    .unwrap();
    bus.insert(
        Range {
            base: 0x1000,
            len: 0x10,
        },
        low.clone(),
    )
    .unwrap();

    let mut data = [0; 4];
    assert!(bus.read(0x1004, &mut data));
    assert_eq!(data, [4; 4]);
    assert!(bus.write(0x200c, &[1, 2, 3, 4]));
    assert_eq!(lock(&high).0, [(0xc, vec![1, 2, 3, 4])]);
    assert!(lock(&low).0.is_empty());
}

#[test]
fn unclaimed_and_straddling_accesses_read_as_ones() {
    let mut bus = Bus::default();
    bus.insert(
        Range {
            base: 0x1000,
            len: 0x10,
        },
        device(),
    )
    .unwrap();
    for address in [0, 0xfff, 0x100e, 0x1010, u64::MAX] {
        let mut data = [0; 4];
        assert!(!bus.read(address, &mut data), "{address:#x}");
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(address, &data));
    }
}

#[test]
fn overlaps_and_bad_ranges_are_refused() {
    let mut bus = Bus::default();
    bus.insert(
        Range {
            base: 0x1000,
            len: 0x10,
        },
        device(),
    )
    .unwrap();
    for (base, len) in [(0x1000, 1), (0xff8, 9), (0x100f, 1)] {
        let range = Range { base, len };
        assert_eq!(bus.insert(range, device()), Err(Error::Overlap(range)));
    }
    for (base, len) in [(5, 0), (u64::MAX, 2)] {
        let range = Range { base, len };
        assert_eq!(bus.insert(range, device()), Err(Error::BadRange(range)));
    }
}
