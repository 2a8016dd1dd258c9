//! Requests of a driver, sane and otherwise, on a small disk.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;

use super::device::Block;
use super::*;
use crate::bus::CountingIrq;
use crate::fixture::{Driver, Part, memory};
use crate::virtio::Transport;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const BYTES: usize = 64 << 10;

fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..BYTES + 100)
        .map(|at| (at / 512) as u8 ^ at as u8)
        .collect();
    file.write_all(&bytes).unwrap();
    file
}

fn driver(file: File, read_only: bool) -> Driver<Block> {
    let disk = Disk::new(file, read_only).unwrap();
    let transport = Transport::new(Block::new(disk, "a-disk"), memory(), irq());
    Driver::start(transport, 0)
}

fn irq() -> Arc<CountingIrq> {
    Arc::default()
}

fn header(kind: u32, sector: u64) -> Part {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    Part::Readable(bytes)
}

/// Sends a request with one data buffer and returns the data and the status.
fn ask(driver: &mut Driver<Block>, kind: u32, sector: u64, data: Part) -> (Vec<u8>, u8) {
    let len = match &data {
        Part::Writable(len) => *len as usize,
        Part::Readable(_) => 0,
    };
    let at = driver.send(0, &[header(kind, sector), data, Part::Writable(1)]);
    assert_eq!(driver.used(0).len(), 1);
    (driver.read(at[1], len), driver.read(at[2], 1)[0])
}

#[test]
fn reads_are_what_the_file_holds() {
    let mut driver = driver(file(), true);
    let (data, status) = ask(&mut driver, IN, 3, Part::Writable(1024));
    assert_eq!(status, OK);
    let expected: Vec<u8> = (3 * 512..5 * 512)
        .map(|at| (at / 512) as u8 ^ at as u8)
        .collect();
    assert_eq!(data, expected);
    // The size is in whole sectors, and the last one can be read.
    assert_eq!(driver.transport.device().disk().bytes(), BYTES as u64);
    assert_eq!(
        ask(&mut driver, IN, BYTES as u64 / 512 - 1, Part::Writable(512)).1,
        OK
    );
}

#[test]
fn writes_are_read_back_and_flushed() {
    let file = file();
    let mut driver = driver(file.try_clone().unwrap(), false);
    let data = vec![0xa5; 2048];
    assert_eq!(
        ask(&mut driver, OUT, 10, Part::Readable(data.clone())).1,
        OK
    );
    assert_eq!(ask(&mut driver, FLUSH, 0, Part::Readable(Vec::new())).1, OK);
    assert_eq!(ask(&mut driver, IN, 10, Part::Writable(2048)).0, data);
}

#[test]
fn what_the_disk_does_not_hold_or_do_is_refused() {
    let mut driver = driver(file(), true);
    let last = BYTES as u64 / 512;
    for sector in [last, last - 1, u64::MAX, u64::MAX / 512] {
        assert_eq!(
            ask(&mut driver, IN, sector, Part::Writable(1024)).1,
            IOERR,
            "{sector}"
        );
    }
    assert_eq!(
        ask(&mut driver, IN, 0, Part::Writable(100)).1,
        IOERR,
        "not a whole sector"
    );
    assert_eq!(
        ask(&mut driver, OUT, 0, Part::Readable(vec![0; 512])).1,
        IOERR,
        "read-only"
    );
    assert_eq!(ask(&mut driver, 77, 0, Part::Writable(512)).1, UNSUPP);
    assert_eq!(
        ask(&mut driver, GET_ID, 0, Part::Writable(4)).1,
        IOERR,
        "no room"
    );
    let (id, status) = ask(&mut driver, GET_ID, 0, Part::Writable(20));
    assert_eq!((&id[..7], status), (b"a-disk\0".as_slice(), OK));
}

#[test]
fn malformed_chains_are_given_back() {
    let mut driver = driver(file(), false);
    for parts in [
        vec![Part::Readable(vec![0; 16])],
        vec![Part::Readable(vec![0; 3]), Part::Writable(1)],
        vec![Part::Writable(1)],
        vec![Part::Writable(512), header(IN, 0)],
    ] {
        driver.send(0, &parts);
        assert_eq!(driver.used(0).len(), 1, "{parts:?}");
    }
    // Buffers outside memory, a chain that loops, and an indirect table that is none.
    for (address, len, flags) in [
        (u64::MAX - 5, 512, 1),
        (0x7000_0000, 512, 3),
        (0x5_0000, 512, 1),
        (0x5_0000, 17, 4),
        (0x5_0000, u32::MAX, 1),
    ] {
        driver.offer(0, &[header(IN, 0)]);
        for index in 0..256 {
            driver.descriptor(0, index, address, len, flags, index);
        }
        driver.notify(0);
        assert_eq!(driver.used(0).len(), 1);
    }
    assert!(driver.transport.is_active());
}

#[test]
fn an_empty_file_is_no_disk() {
    let error = Disk::new(tempfile::tempfile().unwrap(), true).unwrap_err();
    assert!(
        error.to_string().contains("smaller than one sector"),
        "{error}"
    );
}

#[test]
fn a_saved_disk_wants_the_same_disk_again() {
    let file = file();
    let mut driver = driver(file.try_clone().unwrap(), true);
    ask(&mut driver, IN, 0, Part::Writable(512));
    let state = driver.transport.save();
    let restore = |file: File, read_only| {
        let disk = Disk::new(file, read_only).unwrap();
        Transport::<Block>::restore(&state, disk, driver.memory.clone(), irq())
    };
    let copy = restore(file.try_clone().unwrap(), true).unwrap();
    assert_eq!(copy.save(), state);
    assert!(matches!(
        restore(file.try_clone().unwrap(), false),
        Err(persist::Error::Mode(true))
    ));
    file.set_len(512).unwrap();
    assert!(matches!(
        restore(file, true),
        Err(persist::Error::Size { found: 512, .. })
    ));
}
