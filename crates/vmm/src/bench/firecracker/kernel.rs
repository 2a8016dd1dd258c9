//! The smallest thing that Firecracker takes for a kernel: an ELF file of one segment, which waits for a word in its
//! memory, says one on the serial line, and halts.

/// Where it is loaded; Firecracker takes no segment below 1 MiB. Memory this low is in one piece, so this is
/// also its place in a snapshot's memory file.
const ADDRESS: u64 = 16 << 20;
/// Where the code stands in the file.
const OFFSET: u64 = 4096;
/// What the guest says: nothing that a program prints.
pub(super) const WORD: u8 = 0x06;
/// Waits until the byte at its end is not 0, says so, and halts; should anything wake the CPU, it halts again.
const CODE: [u8; 24] = [
    0x80, 0x3d, 0x10, 0, 0, 0, 0, // wait: cmp byte [rip + 16], 0
    0xf3, 0x90, // pause
    0x74, 0xf5, // je wait
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8: the first serial line
    0xb0, WORD, // mov al, the word
    0xee, // out dx, al
    0xfa, // cli
    0xf4, // hlt
    0xeb, 0xfc, // jmp to cli
    0, 0, // the byte that is waited for is the last one
];

/// Where in a snapshot's memory file the byte is that lets the guest go on.
pub(super) const GO_OFFSET: u64 = ADDRESS + CODE.len() as u64 - 1;

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
