//! What a guest may reach, as its owner says it.
//!
//! A rule names a network, an address, a domain or everything, and may name a port. Allowing wins over denying, and
//! both win over the default, which is the public internet. Some addresses no rule can allow: see
//! [`rules::NEVER`](crate::rules::NEVER).

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;

#[cfg(test)]
mod tests;

/// The most rules a policy has: they are all looked at for every new connection.
pub const MAX_RULES: usize = 256;
/// The longest domain name; RFC 1035 §2.3.4.
const MAX_DOMAIN: usize = 253;
const MAX_LABEL: usize = 63;

/// A rule or a set of rules that says nothing useful.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A rule cannot be read.
    #[error(
        "{rule:?} is no rule: {problem}; write 10.1.0.0/16, 192.0.2.7:443, example.com, *.example.com:443 or all"
    )]
    Rule {
        /// The rule.
        rule: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Too many rules.
    #[error(
        "{count} network rules, at most {MAX_RULES} are allowed; name networks instead of addresses"
    )]
    TooMany {
        /// How many there were.
        count: usize,
    },
    /// Rules for a guest without network.
    #[error(
        "rules have no meaning for a sandbox without network; leave them out, or use the network mode nat"
    )]
    NoNetwork,
}

/// Whether there is a network at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// The guest reaches nothing.
    None,
    /// The guest reaches what its rules and the default allow.
    #[default]
    Nat,
}

/// What one rule is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// Everything.
    All,
    /// The addresses of a network.
    Network(IpNet),
    /// One domain.
    Domain(String),
    /// The domains below one, but not that one itself.
    Below(String),
}

/// A target, on every port or on one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Whom it is about.
    pub target: Target,
    /// The TCP or UDP port; `None` is every protocol and port.
    pub port: Option<u16>,
}

/// What a guest may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    mode: Mode,
    allow: Vec<Rule>,
    deny: Vec<Rule>,
}

impl Policy {
    /// No network at all.
    pub const NONE: Policy = Policy {
        mode: Mode::None,
        allow: vec![],
        deny: vec![],
    };

    /// Checks the rules against each other.
    pub fn new(mode: Mode, allow: Vec<Rule>, deny: Vec<Rule>) -> Result<Self, Error> {
        let count = allow.len() + deny.len();
        if count > MAX_RULES {
            return Err(Error::TooMany { count });
        }
        if mode == Mode::None && count > 0 {
            return Err(Error::NoNetwork);
        }
        Ok(Self { mode, allow, deny })
    }

    /// Whether there is a network.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What is allowed beyond the default.
    pub fn allow(&self) -> &[Rule] {
        &self.allow
    }

    /// What is denied of the default.
    pub fn deny(&self) -> &[Rule] {
        &self.deny
    }

    /// Whether a name may be looked up: everything that is not denied and could be reached. Looking up a name tells
    /// whoever serves it, so a guest that may reach nothing but its list may look up nothing else either.
    pub fn may_look_up(&self, name: &str) -> bool {
        let names = |rules: &[Rule]| rules.iter().any(|rule| rule.target.names(name));
        let denies_all = |rule: &Rule| rule.target == Target::All && rule.port.is_none();
        if self.mode == Mode::None {
            return false;
        }
        names(&self.allow)
            || !(self.deny.iter().any(denies_all)
                || self
                    .deny
                    .iter()
                    .any(|r| r.port.is_none() && r.target.names(name)))
    }
}

impl Target {
    /// Whether a domain rule is about this name.
    pub fn names(&self, name: &str) -> bool {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        match self {
            Self::All | Self::Network(_) => false,
            Self::Domain(domain) => name == *domain,
            Self::Below(domain) => name
                .strip_suffix(domain.as_str())
                .is_some_and(|below| below.len() > 1 && below.ends_with('.')),
        }
    }
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |problem| Error::Rule {
            rule: text.to_owned(),
            problem,
        };
        // Whole addresses first: those of version 6 hold colons themselves.
        if let Some(target) = network(text) {
            return Ok(Self { target, port: None });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => {
                let port: u16 = port
                    .parse()
                    .map_err(|_| wrong("its port is no number up to 65535"))?;
                (host, Some(port))
            }
            None => (text, None),
        };
        if port == Some(0) {
            return Err(wrong("there is no port 0"));
        }
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let target = match network(bare) {
            Some(target) => target,
            None => domain(host).map_err(wrong)?,
        };
        Ok(Self { target, port })
    }
}

fn network(text: &str) -> Option<Target> {
    if text == "all" {
        return Some(Target::All);
    }
    let net: IpNet = text
        .parse()
        .or_else(|_| text.parse().map(|a: std::net::IpAddr| a.into()))
        .ok()?;
    Some(match net.prefix_len() {
        0 => Target::All,
        _ => Target::Network(net.trunc()),
    })
}

fn domain(text: &str) -> Result<Target, &'static str> {
    let name = text.trim_end_matches('.').to_ascii_lowercase();
    let (below, name) = match name.strip_prefix("*.") {
        Some(rest) => (true, rest.to_owned()),
        None => (false, name),
    };
    let label = |label: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        !label.is_empty()
            && label.len() <= MAX_LABEL
            && label.bytes().all(plain)
            && !label.starts_with('-')
    };
    if name.is_empty() || name.len() > MAX_DOMAIN || !name.split('.').all(label) {
        return Err("it is neither an address nor a domain name");
    }
    if name
        .split('.')
        .next_back()
        .is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()))
    {
        return Err("it looks like an address, but is none");
    }
    Ok(match below {
        true => Target::Below(name),
        false => Target::Domain(name),
    })
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.target, self.port) {
            (Target::Network(IpNet::V6(net)), Some(_)) => write!(f, "[{net}]")?,
            (target, _) => write!(f, "{target}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Network(net) => write!(f, "{net}"),
            Self::Domain(name) => f.write_str(name),
            Self::Below(name) => write!(f, "*.{name}"),
        }
    }
}
