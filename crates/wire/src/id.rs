//! Validated names: what a tag and a sandbox id may look like.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest tag or id, in bytes.
pub const NAME_LEN_MAX: usize = 64;

/// Why a text is no valid tag or id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// The text is empty.
    #[error("{kind} is empty")]
    Empty {
        /// What was being parsed.
        kind: &'static str,
    },
    /// The text is longer than [`NAME_LEN_MAX`].
    #[error("{kind} has {len} characters, at most {NAME_LEN_MAX} are allowed")]
    TooLong {
        /// What was being parsed.
        kind: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// The text holds a character outside the allowed set, or begins with one that may not begin it.
    #[error(
        "{kind} {text:?} may only hold letters, digits, '-', '_' and '.', and must begin with a letter, a digit or '_'"
    )]
    Character {
        /// What was being parsed.
        kind: &'static str,
        /// The offending text, shortened.
        text: String,
    },
}

fn check(kind: &'static str, text: &str) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName::Empty { kind });
    }
    if text.len() > NAME_LEN_MAX {
        return Err(InvalidName::TooLong {
            kind,
            len: text.len(),
        });
    }
    let body = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let first = text.as_bytes()[0];
    let begins_well = first.is_ascii_alphanumeric() || first == b'_';
    if begins_well && text.bytes().all(body) {
        Ok(())
    } else {
        Err(InvalidName::Character {
            kind,
            text: text.to_owned(),
        })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[cfg_attr(feature = "openapi", schema(pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"))]
        pub struct $name(String);

        impl $name {
            /// Parses and validates.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidName> {
                let text = text.into();
                check($kind, &text)?;
                Ok(Self(text))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name_type!(
    /// The name of a snapshot. A valid tag is a safe file name: no separator, no leading dot.
    Tag,
    "tag"
);
name_type!(
    /// The name of a sandbox on this node.
    SandboxId,
    "sandbox id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_plain_names() {
        for text in [
            "a",
            "quickstart",
            "_x",
            "A-b_c.9",
            &"x".repeat(NAME_LEN_MAX),
        ] {
            assert_eq!(Tag::new(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn refuses_what_could_leave_a_directory_or_look_like_a_flag() {
        for text in [
            "",
            ".",
            "..",
            ".hidden",
            "-flag",
            "a/b",
            "a\0b",
            "a b",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(Tag::new(text).is_err(), "{text:?}");
            assert!(SandboxId::new(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn deserialising_validates() {
        assert!(serde_json::from_str::<Tag>("\"ok\"").is_ok());
        assert!(serde_json::from_str::<Tag>("\"../etc\"").is_err());
    }
}
