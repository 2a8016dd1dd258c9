//! The mappings of this very process, before and after.

use std::os::unix::fs::FileExt as _;

use super::*;

#[test]
fn only_code_and_constants_of_files_are_chosen() {
    let chosen = |line| program_mapping(line);
    let code = "555500001000-555500002000 r-xp 00001000 fe:00 42   /usr/bin/forkd-vmm";
    let (start, end) = (0x5555_0000_1000, 0x5555_0000_2000);
    let is_code = true;
    assert_eq!(
        chosen(code),
        Some(Mapping {
            start,
            end,
            is_code
        })
    );
    let constants = "555500000000-555500001000 r--p 00000000 fe:00 42   /a path/with spaces";
    let found = chosen(constants).unwrap();
    assert!(found.end == start && !found.is_code);
    for other in [
        // Data; guest memory; a mapping shared with others; the vdso; a guard; nothing.
        "555500003000-555500004000 rw-p 00003000 fe:00 42   /usr/bin/forkd-vmm",
        "7f0000000000-7f0010000000 rw-p 00000000 fe:00 43   /var/lib/forkd/memory.bin",
        "7f0000000000-7f0010000000 r--s 00000000 fe:00 44   /var/lib/x",
        "7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0    [vdso]",
        "7ffd00000000-7ffd00001000 ---p 00000000 00:00 0",
        "r-xp",
        "",
    ] {
        assert_eq!(chosen(other), None, "{other:?}");
    }
}

/// Bytes of each mapping of this program's code that are its own copy, and the mappings' places in the file.
fn own_code() -> Vec<(u64, u64, u64)> {
    let program = fs::read_link("/proc/self/exe").unwrap();
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut found = Vec::new();
    let mut lines = smaps.lines();
    while let Some(line) = lines.next() {
        if line.contains(" r-xp ") && line.ends_with(program.to_str().unwrap()) {
            let address = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
            let offset = line.split_ascii_whitespace().nth(2).unwrap();
            let offset = u64::from_str_radix(offset, 16).unwrap();
            let own = lines.find_map(|line| line.strip_prefix("Anonymous:"));
            let kib = own.unwrap().trim().strip_suffix(" kB").unwrap();
            found.push((address, offset, kib.parse().unwrap()));
        }
    }
    found
}

#[test]
fn each_mapping_of_code_gets_one_page_that_reads_as_before() {
    forget();
    up();
    let code = own_code();
    assert!(!code.is_empty());
    let program = File::open("/proc/self/exe").unwrap();
    let memory = File::open("/proc/self/mem").unwrap();
    for (address, offset, own_kib) in code {
        assert_eq!(own_kib, 4, "{address:x}");
        let (mut mapped, mut written) = ([0; 4096], [0; 4096]);
        memory.read_exact_at(&mut mapped, address).unwrap();
        program.read_exact_at(&mut written, offset).unwrap();
        assert_eq!(mapped, written);
    }
}
