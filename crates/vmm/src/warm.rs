//! What every fork would otherwise do again for itself, done once before the first.
//!
//! The kernel does not copy page tables of file mappings on fork: a child faults its program in again, some
//! fifty times until its guest runs, each costing about as much as the copy of a hundred entries. It does copy
//! the tables of a mapping that holds at least one page of the process's own, so each mapping of the program
//! and its libraries is given one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::sys;

/// A mapping of code or constants of a file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    is_code: bool,
}

/// Lets go of the code that has run so far. Before what forks do is rehearsed: then only what they run is mapped when
/// they are made, and no page of what was needed to get here.
pub fn forget() {
    for mapping in mappings().iter().filter(|mapping| mapping.is_code) {
        sys::forget_code(mapping.start, mapping.end);
    }
}

/// Prepares this process to be forked often. What the host does not allow is left out: forks are slower then.
pub fn up() {
    let Ok(memory) = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem")
    else {
        return;
    };
    for mapping in mappings() {
        own_one_page(&memory, mapping.start);
    }
}

fn mappings() -> Vec<Mapping> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().filter_map(program_mapping).collect()
}

/// What a line of `/proc/self/maps` says, if it is of the program or a library, and not writable.
fn program_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let inode = fields.nth(2)?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let is_ours = matches!(permissions, "r-xp" | "r--p") && inode != "0";
    let mapping = Mapping {
        start: address(start)?,
        end: address(end)?,
        is_code: permissions == "r-xp",
    };
    is_ours.then_some(mapping)
}

/// Writes a byte over itself. Through this file the kernel lets a process write where its own mapping forbids
/// it, and gives it a copy of the page.
fn own_one_page(memory: &File, address: u64) {
    let mut byte = [0];
    if memory.read_exact_at(&mut byte, address).is_ok() {
        _ = memory.write_all_at(&byte, address);
    }
}

#[cfg(test)]
mod tests;
