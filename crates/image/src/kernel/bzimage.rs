//! Reads a bzImage: which kernel it is, and the ELF kernel packed inside it.
//!
//! Offsets are those of the boot protocol that the kernel documents for x86.

use std::io::Read;

const BOOT_SECTOR_MAGIC: (usize, &[u8]) = (0x1fe, &[0x55, 0xaa]);
const HEADER_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
const SETUP_SECTORS: usize = 0x1f1;
const PROTOCOL: usize = 0x206;
const VERSION_POINTER: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The payload fields exist since this version of the protocol.
const PROTOCOL_WITH_PAYLOAD: u16 = 0x208;
const VERSION_MAX: usize = 256;
/// No kernel unpacks to more.
const VMLINUX_MAX: usize = 512 * 1024 * 1024;
/// The block size of the LZ4 format that the kernel's build uses.
const LZ4_BLOCK: usize = 8 * 1024 * 1024;

/// The kernel's release (`uname -r`), or what is wrong with the file.
pub fn release(image: &[u8]) -> Result<String, &'static str> {
    for (at, magic) in [BOOT_SECTOR_MAGIC, HEADER_MAGIC] {
        if image.get(at..at + magic.len()) != Some(magic) {
            return Err("it lacks the boot header");
        }
    }
    let pointer = usize::from(u16_at(image, VERSION_POINTER).ok_or("it is truncated")?);
    let text = image.get(pointer + 0x200..).ok_or("it is truncated")?;
    let text = &text[..text.len().min(VERSION_MAX)];
    let end = text
        .iter()
        .position(|b| *b == b' ' || *b == 0)
        .ok_or("its version is damaged")?;
    match std::str::from_utf8(&text[..end]) {
        Ok(release) if pointer != 0 && release.starts_with(|c: char| c.is_ascii_digit()) => {
            Ok(release.to_owned())
        }
        _ => Err("its version is damaged"),
    }
}

/// The uncompressed ELF kernel inside, for monitors that boot nothing else. `None` when it is
/// packed in a way that this function does not read.
pub fn vmlinux(image: &[u8]) -> Option<Vec<u8>> {
    if u16_at(image, PROTOCOL)? < PROTOCOL_WITH_PAYLOAD {
        return None;
    }
    let sectors = usize::from(*image.get(SETUP_SECTORS)?).max(1);
    let start = ((sectors + 1) * 512).checked_add(u32_at(image, PAYLOAD_OFFSET)?)?;
    let payload = image.get(start..start.checked_add(u32_at(image, PAYLOAD_LENGTH)?)?)?;
    let unpacked = match payload.get(..4)? {
        [0x02, 0x21, 0x4c, 0x18] => lz4(payload)?,
        [0x28, 0xb5, 0x2f, 0xfd] => all(zstd::Decoder::new(payload).ok()?.single_frame())?,
        [0x1f, 0x8b, ..] => all(flate2::read::GzDecoder::new(payload))?,
        [0x7f, b'E', b'L', b'F'] => payload.to_vec(),
        _ => return None,
    };
    unpacked.starts_with(b"\x7fELF").then_some(unpacked)
}

/// The legacy LZ4 format: blocks, each after its compressed size. The kernel's build appends the
/// unpacked size as four more bytes.
fn lz4(payload: &[u8]) -> Option<Vec<u8>> {
    let size = u32_at(payload, payload.len().checked_sub(4)?)?;
    if size > VMLINUX_MAX {
        return None;
    }
    let mut out = vec![0; size];
    let (mut filled, mut rest) = (0, payload.get(4..payload.len() - 4)?);
    while !rest.is_empty() && filled < size {
        let length = u32_at(rest, 0)?;
        let block = rest.get(4..length.checked_add(4)?)?;
        let end = size.min(filled + LZ4_BLOCK);
        filled += lz4_flex::block::decompress_into(block, &mut out[filled..end]).ok()?;
        rest = &rest[4 + length..];
    }
    (filled == size).then_some(out)
}

fn all(reader: impl Read) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    reader
        .take(VMLINUX_MAX as u64 + 1)
        .read_to_end(&mut out)
        .ok()?;
    (out.len() <= VMLINUX_MAX).then_some(out)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let number = u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?);
    usize::try_from(number).ok()
}
