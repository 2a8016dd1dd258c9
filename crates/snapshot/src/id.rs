//! What identifies a snapshot for good: a tag can be given again, an id cannot.

use std::fmt;

use serde::{Deserialize, Serialize};

/// 128 random bits as 32 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

/// The text is no snapshot id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no snapshot id: 32 lower-case hex digits are expected")]
pub struct InvalidId {
    /// The text.
    text: String,
}

impl SnapshotId {
    /// The number of hex digits.
    pub const LEN: usize = 32;

    /// A new one; the failure is the operating system's, which has no random numbers.
    pub fn random() -> Result<SnapshotId, getrandom::Error> {
        let mut bytes = [0u8; SnapshotId::LEN / 2];
        getrandom::fill(&mut bytes)?;
        Ok(SnapshotId(format!("{:032x}", u128::from_be_bytes(bytes))))
    }

    /// Parses and validates.
    pub fn new(text: impl Into<String>) -> Result<SnapshotId, InvalidId> {
        let text = text.into();
        let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if text.len() == SnapshotId::LEN && text.bytes().all(digit) {
            Ok(SnapshotId(text))
        } else {
            Err(InvalidId { text })
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        SnapshotId::new(text)
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.0
    }
}
