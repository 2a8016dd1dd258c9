//! The hash of a sparse file's content.
//!
//! It must not depend on where the file system happens to keep holes, and 64 GiB of zeros must cost
//! nothing. So it is blake3, with a key of its own, over: each maximal run of pages that are not all
//! zero, followed by the run's offset and length; at the end the file's size. Numbers are u64,
//! little-endian; pages have 4096 bytes, the last may be shorter. Read backwards this is unambiguous.

use std::fs::File;

use forkd_host::sparse;

/// Part of the format: changing it changes every hash.
const CONTEXT: &str = "forkd snapshot file content v1";

/// Hashes a file; 64 lower-case hex digits.
pub fn content_hash(file: &File) -> Result<String, sparse::Error> {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    let mut run: Option<(u64, u64)> = None;
    sparse::read_nonzero(file, |offset, bytes| {
        let len = bytes.len() as u64;
        match &mut run {
            Some((start, so_far)) if *start + *so_far == offset => *so_far += len,
            _ => end_run(&mut hasher, run.replace((offset, len))),
        }
        hasher.update(bytes);
        Ok(())
    })?;
    end_run(&mut hasher, run);
    hasher.update(&sparse::size(file)?.to_le_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}

fn end_run(hasher: &mut blake3::Hasher, run: Option<(u64, u64)>) {
    if let Some((offset, len)) = run {
        hasher.update(&offset.to_le_bytes());
        hasher.update(&len.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
