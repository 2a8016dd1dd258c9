//! The smallest thing that Firecracker takes for a kernel: an ELF file of one segment that halts.

/// Where it is loaded; Firecracker takes no segment below 1 MiB.
const ADDRESS: u64 = 16 << 20;
/// Where the code stands in the file.
const OFFSET: u64 = 4096;
/// Halt; should anything wake the CPU, halt again.
const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfc]; // cli; hlt; jmp back to cli

/// The file.
pub(super) fn image() -> Vec<u8> {
    let mut file = Vec::new();
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(2u16.to_le_bytes()); // an executable
    file.extend(62u16.to_le_bytes()); // for x86-64
    file.extend(1u32.to_le_bytes());
    file.extend(ADDRESS.to_le_bytes()); // entry
    file.extend(64u64.to_le_bytes()); // program headers come next
    file.extend(0u64.to_le_bytes()); // no sections
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // to be loaded
    file.extend(5u32.to_le_bytes()); // readable, executable
    let len = CODE.len() as u64;
    for word in [OFFSET, ADDRESS, ADDRESS, len, len, 4096] {
        file.extend(word.to_le_bytes());
    }
    file.resize(OFFSET as usize, 0);
    file.extend(CODE);
    file
}
