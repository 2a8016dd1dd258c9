//! What every fork would otherwise do again for itself, done once before the first.
//!
//! The kernel does not copy page tables of file mappings on fork: a child faults its program in again, some
//! fifty times until its guest runs, each costing about as much as the copy of a hundred entries. It does copy
//! the tables of a mapping that holds at least one page of the process's own, so each mapping of the program
//! and its libraries is given one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Prepares this process to be forked often. What the host does not allow is left out: forks are slower then.
pub fn up() {
    let (Ok(maps), Ok(memory)) = (
        fs::read_to_string("/proc/self/maps"),
        File::options()
            .read(true)
            .write(true)
            .open("/proc/self/mem"),
    ) else {
        return;
    };
    for address in maps.lines().filter_map(program_mapping) {
        own_one_page(&memory, address);
    }
}

/// The first address of a mapping of code or constants of a file.
fn program_mapping(line: &str) -> Option<u64> {
    let mut fields = line.split_ascii_whitespace();
    let range = fields.next()?;
    let permissions = fields.next()?;
    let inode = fields.nth(2)?;
    let is_ours = matches!(permissions, "r-xp" | "r--p") && inode != "0";
    let (start, _) = range.split_once('-')?;
    u64::from_str_radix(start, 16).ok().filter(|_| is_ours)
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
