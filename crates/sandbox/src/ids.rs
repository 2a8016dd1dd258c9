//! Fresh names, entropy and machine identities.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::{SandboxId, Tag};

use crate::Error;

/// Letters and digits that are not mistaken for one another; 32 of them, 5 bits each.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// 60 random bits: unguessable within a node, short enough to type.
const SUFFIX_LEN: usize = 12;
/// More than the 256 bits of the kernel's generator.
const ENTROPY_BYTES: usize = 64;

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| {
        Error::new(
            ErrorCode::Internal,
            format!("the operating system gives no random numbers: {e}"),
        )
    })?;
    Ok(bytes)
}

/// Random letters and digits.
pub(crate) fn suffix() -> Result<String, Error> {
    let bytes = random::<SUFFIX_LEN>()?;
    Ok(bytes
        .iter()
        .map(|b| char::from(ALPHABET[usize::from(b % 32)]))
        .collect())
}

/// A new sandbox's id.
pub(crate) fn sandbox() -> Result<SandboxId, Error> {
    SandboxId::new(format!("sb-{}", suffix()?)).map_err(invalid)
}

/// A branch's tag, when none was asked for.
pub(crate) fn branch_tag() -> Result<Tag, Error> {
    Tag::new(format!("branch-{}", suffix()?)).map_err(invalid)
}

fn invalid(error: forkd_wire::id::InvalidName) -> Error {
    Error::new(ErrorCode::Internal, error.to_string())
}

/// Entropy for a guest, base64.
pub(crate) fn entropy() -> Result<String, Error> {
    Ok(STANDARD.encode(random::<ENTROPY_BYTES>()?))
}

/// A systemd machine id: 32 lower-case hex digits, a version 4 UUID without dashes.
pub(crate) fn machine_id() -> Result<String, Error> {
    let mut bytes = random::<16>()?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_valid_and_differ() {
        let ids: std::collections::BTreeSet<_> = (0..100).map(|_| sandbox().unwrap()).collect();
        assert_eq!(ids.len(), 100);
        assert!(branch_tag().unwrap().as_str().starts_with("branch-"));
    }

    #[test]
    fn a_machine_id_is_a_version_4_uuid() {
        let id = machine_id().unwrap();
        assert_eq!(id.len(), 32);
        assert_eq!(&id[12..13], "4");
        assert!(id.bytes().all(|c| c.is_ascii_hexdigit()));
    }
}
