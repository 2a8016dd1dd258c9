//! Facts that snapshots depend on: versions of programs that are other projects', the CPU.

use std::collections::BTreeMap;

/// A version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) patch: u32,
}

impl Version {
    pub(crate) const fn new(major: u32, minor: u32, patch: u32) -> Version {
        Version {
            major,
            minor,
            patch,
        }
    }

    /// Finds the version that stands after the first `word` in what a program prints of itself.
    pub(crate) fn after(word: &str, text: &str) -> Option<Version> {
        let (_, rest) = text.split_once(word)?;
        let number = rest
            .split(|c: char| !(c.is_ascii_digit() || c == '.'))
            .next()?;
        let mut numbers = number.split('.').map(str::parse);
        Some(Version {
            major: numbers.next()?.ok()?,
            minor: numbers.next()?.ok()?,
            patch: numbers.next().and_then(Result::ok).unwrap_or(0),
        })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The CPU model, as guests with hardware virtualisation see it too.
pub(crate) fn host_cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.and_then(|rest| rest.split_once(':'));
    model.map_or("unknown", |(_, name)| name.trim()).to_owned()
}

/// How a fact differs from what was recorded, in words; `same` decides whether it does.
pub(crate) fn change(
    key: &str,
    recorded: &BTreeMap<String, String>,
    here: &BTreeMap<String, String>,
    same: impl Fn(Option<&String>, Option<&String>) -> bool,
) -> Option<String> {
    let (there, here) = (recorded.get(key), here.get(key));
    (!same(there, here)).then(|| {
        let name = key.replace('_', " ");
        let (there, here) = (say(there), say(here));
        format!("{name} was {there} when it was made, here it is {here}")
    })
}

/// A fact that is not recorded, or its words.
pub(crate) fn say(fact: Option<&String>) -> &str {
    fact.map_or("unknown", String::as_str)
}
