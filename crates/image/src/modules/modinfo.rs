//! Reads one kernel module: its bytes, and what it says about itself.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection};

use super::Error;
use crate::tool;

/// No module is larger; guards against a compressed file that never ends.
const MODULE_MAX: u64 = 64 * 1024 * 1024;

/// What a module says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Info {
    /// The kernel it was built for, as in `uname -r`.
    pub release: String,
    /// Modules that must be loaded before it.
    pub depends: Vec<String>,
    /// Modules that should be loaded before it if the kernel has them.
    pub soft: Vec<String>,
}

/// The bytes of a module, decompressed if need be.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let extension = path.extension().and_then(|e| e.to_str());
    if extension == Some("xz") {
        return unxz(path);
    }
    let file = fs::File::open(path).map_err(failed)?;
    let reader: Box<dyn Read> = match extension {
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Some("zst") => Box::new(zstd::Decoder::new(file).map_err(failed)?),
        _ => Box::new(file),
    };
    let mut content = Vec::new();
    reader
        .take(MODULE_MAX + 1)
        .read_to_end(&mut content)
        .map_err(failed)?;
    if content.len() as u64 > MODULE_MAX {
        return Err(failed(io::Error::other("larger than any kernel module")));
    }
    Ok(content)
}

fn unxz(path: &Path) -> Result<Vec<u8>, Error> {
    tool::XZ
        .bytes(
            [std::ffi::OsStr::new("-dc"), "--".as_ref(), path.as_os_str()],
            MODULE_MAX,
        )
        .map_err(|source| Error::Decompress {
            path: path.to_owned(),
            source,
        })
}

/// Reads the `.modinfo` section: `key=value` strings, each ended by a zero byte.
pub(crate) fn parse(content: &[u8]) -> Result<Info, &'static str> {
    let elf = ElfFile64::<Endianness>::parse(content).map_err(|_| "not a 64-bit ELF file")?;
    let section = elf
        .section_by_name(".modinfo")
        .ok_or("it has no .modinfo section")?;
    let data = section
        .data()
        .map_err(|_| "its .modinfo section is damaged")?;
    Ok(parse_strings(data))
}

fn parse_strings(data: &[u8]) -> Info {
    let mut info = Info::default();
    for string in data.split(|b| *b == 0) {
        let Ok(string) = std::str::from_utf8(string) else {
            continue;
        };
        match string.split_once('=') {
            Some(("vermagic", value)) => {
                info.release = value.split(' ').next().unwrap_or_default().to_owned();
            }
            Some(("depends", value)) => {
                let names = value.split(',').filter(|n| !n.is_empty());
                info.depends.extend(names.map(str::to_owned));
            }
            Some(("softdep", value)) => info.soft.extend(soft_before(value)),
            _ => {}
        }
    }
    info
}

/// `pre: a b post: c` gives `a` and `b`.
fn soft_before(value: &str) -> Vec<String> {
    let mut before = false;
    let mut names = Vec::new();
    for word in value.split_ascii_whitespace() {
        match word {
            "pre:" => before = true,
            "post:" => before = false,
            name if before => names.push(name.to_owned()),
            _ => {}
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_a_module() {
        let data = b"license=GPL\0softdep=pre: crc32c aes post: x\0\0depends=virtio,virtio_ring\0\
                     vermagic=6.1.0-13-cloud-amd64 SMP preempt mod_unload \0\xff\xfe=x\0";
        let info = parse_strings(data);
        assert_eq!(info.release, "6.1.0-13-cloud-amd64");
        assert_eq!(info.depends, ["virtio", "virtio_ring"]);
        assert_eq!(info.soft, ["crc32c", "aes"]);
        assert_eq!(parse_strings(b"depends=\0").depends, Vec::<String>::new());
    }

    #[test]
    fn what_is_no_module_is_refused() {
        assert!(parse(b"").is_err());
        assert!(parse(b"\x7fELF garbage").is_err());
        assert!(parse(&[0; 4096]).is_err());
    }
}
