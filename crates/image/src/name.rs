//! Names that cannot be wrong: images, Debian packages, suites and mirrors.
//!
//! Whatever passes here may be put on a command line or in a path; nothing else may.

/// Longest image name, in bytes; leaves room for a digest in a file name.
const IMAGE_NAME_MAX: usize = 64;

/// A name that is refused, and the rule it breaks.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum Error {
    /// Not an image name.
    #[error(
        "`{0}` is not an image name: use a-z, 0-9, `.`, `_`, `-`, start with a letter or digit, \
         at most 64 characters"
    )]
    Image(String),
    /// Not a package name.
    #[error(
        "`{0}` is not a Debian package name (like `python3-numpy` or `git=1:2.39.5-0+deb12u2`)"
    )]
    Package(String),
    /// Not a suite.
    #[error("`{0}` is not a Debian suite (like `bookworm` or `trixie`)")]
    Suite(String),
    /// Not a mirror.
    #[error(
        "`{0}` is not a mirror address: it starts with http://, https:// or file:// and has no spaces"
    )]
    Mirror(String),
    /// Not a kernel module.
    #[error("`{0}` is not a kernel module name (like `virtio_net`)")]
    Module(String),
}

fn lower_or_digit(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

/// Checks the name of an image.
pub fn image(name: &str) -> Result<(), Error> {
    let ok = name.len() <= IMAGE_NAME_MAX
        && name.bytes().next().is_some_and(lower_or_digit)
        && name
            .bytes()
            .all(|b| lower_or_digit(b) || b"._-".contains(&b));
    if ok {
        Ok(())
    } else {
        Err(Error::Image(name.to_owned()))
    }
}

/// Makes an image name of any text, for sources that come without a name.
pub fn image_from(text: &str) -> String {
    let mut name = String::new();
    for c in text.chars().map(|c| c.to_ascii_lowercase()) {
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            name.push(c);
        } else if !name.is_empty() && !name.ends_with('-') {
            name.push('-');
        }
    }
    name.truncate(IMAGE_NAME_MAX);
    let name = name.trim_end_matches('-');
    if name.is_empty() {
        "image".to_owned()
    } else {
        name.to_owned()
    }
}

/// Checks a Debian package name, with or without `=version`. A trailing dash, which apt takes for
/// a request to remove, is refused.
pub fn package(text: &str) -> Result<(), Error> {
    let (name, version) = match text.split_once('=') {
        Some((name, version)) => (name, Some(version)),
        None => (text, None),
    };
    let name_ok = (2..=128).contains(&name.len())
        && name.bytes().next().is_some_and(lower_or_digit)
        && !name.ends_with('-')
        && name
            .bytes()
            .all(|b| lower_or_digit(b) || b"+-.".contains(&b));
    let version_ok = version.is_none_or(|v| {
        (1..=128).contains(&v.len())
            && v.bytes().next().is_some_and(|b| b.is_ascii_digit())
            && v.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b".+-:~".contains(&b))
    });
    if name_ok && version_ok {
        Ok(())
    } else {
        Err(Error::Package(text.to_owned()))
    }
}

/// Checks a Debian suite.
pub fn suite(text: &str) -> Result<(), Error> {
    let ok = (2..=40).contains(&text.len())
        && text.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
        && text.bytes().all(|b| lower_or_digit(b) || b == b'-');
    if ok {
        Ok(())
    } else {
        Err(Error::Suite(text.to_owned()))
    }
}

/// Checks the address of a package mirror.
pub fn mirror(text: &str) -> Result<(), Error> {
    let known = ["http://", "https://", "file://"]
        .iter()
        .any(|scheme| text.starts_with(scheme));
    let clean = text.len() <= 512
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~:/%@+=".contains(&b));
    if known && clean {
        Ok(())
    } else {
        Err(Error::Mirror(text.to_owned()))
    }
}

/// Checks the name of a kernel module.
pub fn module(text: &str) -> Result<(), Error> {
    let ok = (1..=64).contains(&text.len())
        && text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if ok {
        Ok(())
    } else {
        Err(Error::Module(text.to_owned()))
    }
}

#[cfg(test)]
mod tests;
