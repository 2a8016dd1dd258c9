//! A kernel as Firecracker takes it: an ELF file. Distributions ship a bzImage, a small program that unpacks that ELF
//! file from itself; where it lies is said in the head of the image (Linux's boot protocol, from version 2.08).
//!
//! ```text
//!   0x1f1 sectors of real-mode code   0x202 "HdrS"   0x206 version   0x248 payload offset   0x24c payload length
//! ```
//!
//! Unpacking it here is faster than in the guest, and any Firecracker takes the result.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::Path;

use lzma_rust2::XzReader;

use crate::Error;
use crate::rundir::failed;

/// The most bytes of a kernel, as it is and unpacked.
const SIZE_MAX: u64 = 512 << 20;
const ELF: &[u8] = b"\x7fELF";
const SECTOR: usize = 512;
/// The oldest boot protocol that says where the payload is.
const PROTOCOL: u16 = 0x0208;
/// In the legacy format of lz4, which kernels use, every block is unpacked to at most this.
const LZ4_BLOCK: usize = 8 << 20;

/// Writes the kernel at `from` to a new file, as ELF. Blocks.
pub(super) fn unpack(from: &Path, to: &Path) -> Result<(), Error> {
    let mut image = Vec::new();
    let mut file = File::open(from).map_err(failed("open the kernel", from))?;
    let read = (&mut file).take(SIZE_MAX).read_to_end(&mut image);
    read.map_err(failed("read the kernel", from))?;
    let mut out = File::create_new(to).map_err(failed("unpack the kernel to", to))?;
    let unpacked = match image.starts_with(ELF) {
        true => out.write_all(&image),
        false => unpack_image(&image, &mut out),
    };
    unpacked.map_err(|error| {
        let _ = std::fs::remove_file(to);
        failed("unpack the kernel", from)(error)
    })
}

fn unpack_image(image: &[u8], out: &mut impl Write) -> io::Result<()> {
    let payload = payload(image)
        .ok_or_else(|| invalid("it is neither a bzImage nor an ELF file (vmlinux)"))?;
    let payload = &image[payload];
    let mut out = Checked {
        out,
        written: 0,
        head: Vec::new(),
    };
    // Whatever follows the packed kernel is its size once more, for the code that unpacks it.
    match payload {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            io::copy(&mut XzReader::new(payload, false), &mut out)?;
        }
        [0x1f, 0x8b, ..] => {
            io::copy(&mut flate2::read::GzDecoder::new(payload), &mut out)?;
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut frame = zstd::stream::read::Decoder::with_buffer(payload)?.single_frame();
            io::copy(&mut frame, &mut out)?;
        }
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => unpack_lz4(rest, &mut out)?,
        [0x7f, b'E', b'L', b'F', ..] => out.write_all(payload)?,
        _ => {
            return Err(invalid(
                "it is packed in a way that is not known (known: xz, zstd, gzip, lz4)",
            ));
        }
    }
    match out.head.starts_with(ELF) {
        true => Ok(()),
        false => Err(invalid("what is packed in it is no ELF file")),
    }
}

/// Where the packed kernel lies in an image.
fn payload(image: &[u8]) -> Option<Range<usize>> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let version = image.get(0x206..0x208)?.try_into().ok()?;
    if image.get(0x202..0x206)? != b"HdrS" || u16::from_le_bytes(version) < PROTOCOL {
        return None;
    }
    // Nothing is four, for images of old.
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((sectors + 1) * SECTOR).checked_add(word(0x248)?)?;
    let end = start.checked_add(word(0x24c)?)?;
    (end <= image.len()).then_some(start..end)
}

/// Blocks, each behind its length; the last word may be the size of all.
fn unpack_lz4(mut rest: &[u8], out: &mut impl Write) -> io::Result<()> {
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((length, after)) = rest.split_at_checked(4) {
        let length = u32::from_le_bytes(length.try_into().unwrap_or_default());
        let Some((packed, after)) = after.split_at_checked(length as usize) else {
            return match after.is_empty() {
                true => Ok(()),
                false => Err(invalid("it is cut short")),
            };
        };
        let size = lz4_flex::block::decompress_into(packed, &mut block);
        let size = size.map_err(|error| invalid(&error.to_string()))?;
        out.write_all(&block[..size])?;
        rest = after;
    }
    Ok(())
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

/// Counts what is written, and keeps how it begins.
struct Checked<'a, W> {
    out: &'a mut W,
    written: u64,
    head: Vec<u8>,
}

impl<W: Write> Write for Checked<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.written + bytes.len() as u64 > SIZE_MAX {
            return Err(invalid("it is larger than any kernel when unpacked"));
        }
        let missing = ELF.len().saturating_sub(self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..missing]);
        let written = self.out.write(bytes)?;
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image around a payload, which is followed by its unpacked size and by the code that unpacks it.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0x90; 3 * SECTOR + 100];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&100_u32.to_le_bytes());
        let length = payload.len() as u32 + 4;
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&300_000_u32.to_le_bytes());
        image.extend_from_slice(&[0x90; 100]);
        image
    }

    fn kernel() -> Vec<u8> {
        let body = (0..300_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8);
        ELF.iter().copied().chain(body).collect()
    }

    fn unpacked(image: &[u8]) -> Result<Vec<u8>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("bzImage"), dir.path().join("vmlinux"));
        std::fs::write(&from, image).unwrap();
        unpack(&from, &to).map(|()| std::fs::read(to).unwrap())
    }

    #[test]
    fn kernels_of_every_packing_are_unpacked() {
        let kernel = kernel();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&kernel).unwrap();
        let zstd = zstd::encode_all(&kernel[..], 1).unwrap();
        let block = lz4_flex::block::compress(&kernel);
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        lz4.extend_from_slice(&(block.len() as u32).to_le_bytes());
        lz4.extend_from_slice(&block);
        for payload in [gzip.finish().unwrap(), zstd, lz4, kernel.clone()] {
            let found = unpacked(&image(&payload)).unwrap();
            assert!(found.starts_with(&kernel), "{:x?}", &payload[..4]);
        }
        assert_eq!(unpacked(&kernel).unwrap(), kernel, "as it is");
    }

    /// Debian's is packed by xz, with a filter for x86 code.
    #[test]
    fn a_distributions_kernel_is_unpacked() {
        let Some(dir) = crate::test_image::directory() else {
            return;
        };
        let to = tempfile::tempdir().unwrap();
        let to = to.path().join("vmlinux");
        unpack(&dir.join("kernel"), &to).unwrap();
        let kernel = std::fs::read(to).unwrap();
        assert!(kernel.starts_with(ELF) && kernel.len() > 16 << 20);
        let banner = kernel.windows(14).any(|bytes| bytes == b"Linux version ");
        assert!(banner, "{} bytes without a banner", kernel.len());
    }

    #[test]
    fn what_is_no_kernel_says_so() {
        let text = |image: &[u8]| forkd_host::chain(&unpacked(image).unwrap_err());
        assert!(text(&[0x5a; 5000]).contains("neither a bzImage nor an ELF file"));
        assert!(text(b"").contains("neither"));
        assert!(text(&image(b"BZh9.....")).contains("xz, zstd"));
        let garbage = zstd::encode_all(&[0_u8; 100][..], 1).unwrap();
        assert!(text(&image(&garbage)).contains("no ELF file"));
        let mut cut = image(&zstd::encode_all(&kernel()[..], 1).unwrap());
        cut.truncate(cut.len() / 2);
        assert!(text(&cut).contains("neither"));
    }
}
