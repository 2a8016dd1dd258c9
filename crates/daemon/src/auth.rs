//! Who may use the interface, and for what.
//!
//! Tokens come from a file or a directory and are kept as hashes. They are read again when the file changes
//! or a SIGHUP arrives; a file that is then unusable changes nothing and is reported in the log.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use forkd_wire::error::ErrorCode;
use http::{HeaderMap, Method, header};

use crate::ApiError;

pub mod tokens;

use tokens::{Scope, Tokens};

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The name of the token, or `anonymous` where none is needed.
    pub(crate) name: String,
    /// What the token allows.
    pub(crate) scope: Scope,
}

/// The tokens in force.
#[derive(Debug)]
pub struct Access {
    source: Option<PathBuf>,
    tokens: RwLock<Option<Arc<Tokens>>>,
}

impl Access {
    /// Everybody may do everything.
    pub fn open() -> Self {
        Self {
            source: None,
            tokens: RwLock::new(None),
        }
    }

    /// Only who holds a token of this file or directory.
    pub fn from_path(source: &Path) -> Result<Self, tokens::Error> {
        let tokens = Tokens::read(source)?;
        Ok(Self {
            source: Some(source.to_owned()),
            tokens: RwLock::new(Some(Arc::new(tokens))),
        })
    }

    /// Reads the tokens again, and says whether they have changed.
    pub fn reload(&self) -> Result<bool, tokens::Error> {
        let Some(source) = &self.source else {
            return Ok(false);
        };
        let fresh = Tokens::read(source)?;
        let mut tokens = self.tokens.write().unwrap_or_else(PoisonError::into_inner);
        let changed = tokens.as_deref() != Some(&fresh);
        *tokens = Some(Arc::new(fresh));
        Ok(changed)
    }

    /// Who sends these headers.
    pub(crate) fn identify(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let tokens = self
            .tokens
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(tokens) = tokens else {
            return Ok(Caller {
                name: "anonymous".to_owned(),
                scope: Scope::Admin,
            });
        };
        let token = bearer(headers)
            .ok_or_else(|| ApiError::new(ErrorCode::Unauthorized, "missing bearer token"))?;
        let found = tokens.find(token);
        found.ok_or_else(|| ApiError::new(ErrorCode::Unauthorized, "invalid bearer token"))
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The scope a route needs. `route` is the pattern, such as `/v1/sandboxes/{id}`.
pub(crate) fn needed(method: &Method, route: &str) -> Scope {
    const OF_GUESTS: [&str; 4] = ["/files", "/exec/ws", "/console", "/processes"];
    let reading = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    if reading {
        // What is inside a sandbox belongs to those who use it.
        let of_guest = OF_GUESTS.iter().any(|part| route.contains(part));
        return if of_guest { Scope::Use } else { Scope::Read };
    }
    if route.starts_with("/v1/snapshots") {
        Scope::Admin
    } else {
        Scope::Use
    }
}

#[cfg(test)]
mod tests;
