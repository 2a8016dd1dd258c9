//! Lines arrive whole, output is bounded, registers survive.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::sync::Arc;

use super::*;
use crate::bus::{BusDevice as _, CountingIrq};

fn read(mut file: std::fs::File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn lines_are_passed_on_whole() {
    let file = tempfile::tempfile().unwrap();
    let sink = Sink::new(Some(file.try_clone().unwrap()));
    let mut console = Console::new(sink, Arc::new(CountingIrq::default()));
    for byte in b"one\ntwo" {
        console.write(0, &[*byte]);
    }
    assert_eq!(read(file.try_clone().unwrap()), b"one\n");
    console.flush();
    assert_eq!(read(file), b"one\ntwo");
}

#[test]
fn the_file_is_bounded_and_keeps_the_latest() {
    let file = tempfile::tempfile().unwrap();
    let mut sink = Sink::new(Some(file.try_clone().unwrap()));
    let line = [b"x".repeat(255), b"\n".to_vec()].concat();
    for _ in 0..OUTPUT_MAX / 256 + 10 {
        std::io::Write::write_all(&mut sink, &line).unwrap();
    }
    std::io::Write::write_all(&mut sink, b"last\n").unwrap();
    let found = read(file);
    assert!(found.len() as u64 <= OUTPUT_MAX + 64);
    assert!(found.starts_with(b"[older"));
    assert!(found.ends_with(b"last\n"));
}

#[test]
fn registers_survive_and_garbage_does_not_panic() {
    let mut console = Console::new(Sink::new(None), Arc::new(CountingIrq::default()));
    console.write(7, &[0x5a]);
    console.write(1, &[0x02]);
    for offset in 0..8 {
        for value in 0..=255 {
            if offset != 7 {
                console.write(offset, &[value]);
            }
            let mut data = [0];
            console.read(offset, &mut data);
        }
        console.write(offset, &[1, 2, 3, 4]);
    }
    let state = console.save();
    let mut copy =
        Console::restore(&state, Sink::new(None), Arc::new(CountingIrq::default())).unwrap();
    assert_eq!(copy.save(), state);
    let mut scratch = [0];
    copy.read(7, &mut scratch);
    assert_eq!(scratch, [0x5a]);
}

#[test]
fn a_pipe_that_nobody_reads_does_not_hold_up_the_guest() {
    let (reader, writer) = std::io::pipe().unwrap();
    let sink = Sink::new(Some(std::os::fd::OwnedFd::from(writer).into()));
    let mut console = Console::new(sink, Arc::new(CountingIrq::default()));
    for _ in 0..3000 {
        b"sixty-four bytes of output that nobody has asked for, line by li\n"
            .iter()
            .for_each(|byte| console.write(0, &[*byte]));
    }
    // What fitted is there; the rest was dropped.
    drop(console);
    let text = std::io::read_to_string(reader).unwrap();
    assert!(text.lines().count() > 100 && text.lines().count() < 3000);
    assert!(text.lines().all(|line| line.ends_with("by li")));
}
