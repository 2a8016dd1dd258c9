//! Reading tokens. Pure, but for the reading itself.
//!
//! ```text
//!   FILE   one token alone                     may do everything, named "default"
//!          NAME:SCOPE:TOKEN, one a line        '#' begins a comment
//!   DIR    one file a token, NAME or NAME.SCOPE, as a mounted secret is
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq;

use super::Caller;

/// Shortest token, bytes.
const TOKEN_LEN_MIN: usize = 16;
/// Largest file of tokens, bytes.
const FILE_LEN_MAX: u64 = 256 * 1024;
/// How to make a good token.
const RECIPE: &str = "make one with `head -c 32 /dev/urandom | base64`";

/// What a token allows. Each scope includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Look at lists and states.
    Read,
    /// Make, use and kill sandboxes, and look inside them.
    Use,
    /// Make and remove snapshots.
    Admin,
}

impl Scope {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "read" => Some(Self::Read),
            "use" => Some(Self::Use),
            "admin" => Some(Self::Admin),
            _ => None,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Use => "use",
            Self::Admin => "admin",
        })
    }
}

/// Why tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file or directory cannot be read.
    #[error("cannot read tokens from {}", .path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no token.
    #[error("{} holds no token; {RECIPE}", .0.display())]
    Empty(PathBuf),
    /// The token is the placeholder of an example.
    #[error("the token {name:?} in {} is a placeholder; {RECIPE}", .path.display())]
    Placeholder {
        /// The file.
        path: PathBuf,
        /// The token's name.
        name: String,
    },
    /// The token can be guessed.
    #[error(
        "the token {name:?} in {} has {len} bytes, at least {TOKEN_LEN_MIN} are needed; {RECIPE}",
        .path.display()
    )]
    Short {
        /// The file.
        path: PathBuf,
        /// The token's name.
        name: String,
        /// Its length.
        len: usize,
    },
    /// A line is not understood.
    #[error(
        "line {line} of {} is not NAME:SCOPE:TOKEN with a scope of read, use or admin",
        .path.display()
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// Two tokens have one name, or two names one token.
    #[error("the token {name:?} in {} is there twice", .path.display())]
    Twice {
        /// The file or directory.
        path: PathBuf,
        /// The second one's name.
        name: String,
    },
}

/// All tokens in force.
#[derive(PartialEq, Eq)]
pub(super) struct Tokens {
    entries: Vec<Entry>,
}

#[derive(PartialEq, Eq)]
struct Entry {
    name: String,
    scope: Scope,
    hash: [u8; 32],
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.entries.iter().map(|entry| (&entry.name, entry.scope));
        f.debug_map().entries(names).finish()
    }
}

impl Tokens {
    /// Reads a file or a directory.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        let mut tokens = Self {
            entries: Vec::new(),
        };
        if std::fs::metadata(path).map_err(failed)?.is_dir() {
            let mut files = BTreeSet::new();
            for entry in std::fs::read_dir(path).map_err(failed)? {
                files.insert(entry.map_err(failed)?.path());
            }
            for file in files {
                tokens.add_file_of_directory(&file)?;
            }
        } else {
            tokens.add_lines(path, &read_text(path)?)?;
        }
        if tokens.entries.is_empty() {
            return Err(Error::Empty(path.to_owned()));
        }
        Ok(tokens)
    }

    fn add_file_of_directory(&mut self, path: &Path) -> Result<(), Error> {
        let file = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // Mounted secrets keep their versions beside the entries, under hidden names.
        if file.starts_with('.') || path.is_dir() {
            return Ok(());
        }
        let parts = file
            .rsplit_once('.')
            .and_then(|(name, ext)| Some((name, Scope::parse(ext)?)));
        let (name, scope) = parts.unwrap_or((&file, Scope::Admin));
        self.add(path, name, scope, read_text(path)?.trim())
    }

    fn add_lines(&mut self, path: &Path, text: &str) -> Result<(), Error> {
        let lines = text.lines().map(str::trim).enumerate();
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let lines: Vec<(usize, &str)> = lines.collect();
        for (at, line) in &lines {
            match parse_line(line) {
                Some((name, scope, token)) => self.add(path, name, scope, token)?,
                None if lines.len() == 1 => self.add(path, "default", Scope::Admin, line)?,
                None => {
                    return Err(Error::Line {
                        path: path.to_owned(),
                        line: at + 1,
                    });
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, name: &str, scope: Scope, token: &str) -> Result<(), Error> {
        let (path, name) = (path.to_owned(), name.to_owned());
        if token.is_empty() {
            return Err(Error::Empty(path));
        }
        if token.starts_with("REPLACE_ME") || token.starts_with("CHANGE_ME") {
            return Err(Error::Placeholder { path, name });
        }
        if token.len() < TOKEN_LEN_MIN {
            return Err(Error::Short {
                path,
                name,
                len: token.len(),
            });
        }
        let hash = *blake3::hash(token.as_bytes()).as_bytes();
        if self
            .entries
            .iter()
            .any(|entry| entry.name == name || entry.hash == hash)
        {
            return Err(Error::Twice { path, name });
        }
        self.entries.push(Entry { name, scope, hash });
        Ok(())
    }

    /// Whose token this is. Takes the same time for every token: hashes of one length are compared with
    /// all entries, whichever fits.
    pub(super) fn find(&self, token: &str) -> Option<Caller> {
        let hash = *blake3::hash(token.as_bytes()).as_bytes();
        let mut found = None;
        for entry in &self.entries {
            if bool::from(entry.hash.ct_eq(&hash)) {
                found = Some(entry);
            }
        }
        found.map(|entry| Caller {
            name: entry.name.clone(),
            scope: entry.scope,
        })
    }
}

fn read_text(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let len = std::fs::metadata(path).map_err(failed)?.len();
    if len > FILE_LEN_MAX {
        return Err(failed(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{len} bytes, at most {FILE_LEN_MAX} are allowed"),
        )));
    }
    std::fs::read_to_string(path).map_err(failed)
}

fn parse_line(line: &str) -> Option<(&str, Scope, &str)> {
    let (name, rest) = line.split_once(':')?;
    let (scope, token) = rest.split_once(':')?;
    let named = !name.is_empty() && !name.contains(char::is_whitespace);
    Some((name, Scope::parse(scope.trim())?, token.trim())).filter(|_| named)
}
