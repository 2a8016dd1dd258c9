//! What the repository looks like, as rules over its texts. Pure: a test reads the files and asks.
//!
//! The rules read Rust line by line and trust that rustfmt has been over it. They are there to keep
//! the house as ARCHITECTURE.md draws it, not to catch somebody who wants to get around them.

use std::fmt;

/// Lines of code in a file, without tests, comments and blank lines.
pub(crate) const FILE_LINES_MAX: usize = 500;
/// Lines of a function, from its signature to its closing brace.
pub(crate) const FUNCTION_LINES_MAX: usize = 70;
/// Bytes of a file.
pub(crate) const BLOB_BYTES_MAX: u64 = 256 * 1024;

/// Who may depend on whom: a crate, and the crates below it.
const EDGES: &[(&str, &[&str])] = &[
    ("wire", &[]),
    ("host", &["wire"]),
    ("snapshot", &["host", "wire"]),
    ("image", &["host", "wire"]),
    ("slot", &["host"]),
    ("engine", &["host", "wire"]),
    (
        "sandbox",
        &["engine", "host", "image", "slot", "snapshot", "wire"],
    ),
    (
        "daemon",
        &[
            "engine", "host", "image", "sandbox", "slot", "snapshot", "wire",
        ],
    ),
    (
        "cli",
        &[
            "daemon", "engine", "host", "image", "sandbox", "slot", "wire",
        ],
    ),
    ("agent", &["wire"]),
    ("vmm", &["host", "wire"]),
];

/// Packages that a crate must not know: async runtimes below the engines, HTTP below the daemon.
const FOREIGN: &[(&str, &[&str])] = &[
    ("wire", &["tokio", "hyper", "axum", "rustix", "libc"]),
    ("host", &["tokio", "hyper", "axum", "serde", "serde_json"]),
    ("snapshot", &["tokio", "hyper", "axum"]),
    ("image", &["tokio", "hyper", "axum"]),
    ("vmm", &["tokio", "hyper", "axum"]),
    ("engine", &["axum"]),
    ("sandbox", &["axum"]),
    ("agent", &["axum"]),
];

/// Files that may hold `unsafe` beside those named `sys.rs`: the machine monitor's guest memory and
/// its two doors to KVM.
const UNSAFE_FILES: &[&str] = &[
    "crates/vmm/src/kvm.rs",
    "crates/vmm/src/memory.rs",
    "crates/vmm/src/vcpu.rs",
];

/// Something that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// The file, from the repository's root.
    pub(crate) path: String,
    /// The line, counted from 1; 0 is the whole file.
    pub(crate) line: usize,
    /// What is wrong.
    pub(crate) message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}

fn finding(path: &str, line: usize, message: impl Into<String>) -> Finding {
    Finding {
        path: path.to_owned(),
        line,
        message: message.into(),
    }
}

/// Checks any text file.
pub(crate) fn check_text(path: &str, text: &str, local_paths: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Spelled so that this file passes.
    let markers = [concat!("TO", "DO"), concat!("FIX", "ME")];
    for (line, content) in numbered(text) {
        if ["<<<<<<< ", ">>>>>>> "]
            .iter()
            .any(|edge| content.starts_with(edge))
        {
            findings.push(finding(path, line, "two versions stand here; choose one"));
        }
        for marker in markers {
            if words(content).any(|word| word == marker) {
                findings.push(finding(path, line, format!("{marker}: do it or leave it")));
            }
        }
        for local in local_paths.iter().filter(|local| has_path(content, local)) {
            findings.push(finding(
                path,
                line,
                format!("{local} exists on one machine only"),
            ));
        }
    }
    findings
}

/// Checks a Rust file.
pub(crate) fn check_rust(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !text.starts_with("//!") {
        findings.push(finding(
            path,
            1,
            "does not open with a //! line that says what it is",
        ));
    }
    if path.ends_with("/mod.rs") {
        findings.push(finding(
            path,
            0,
            "is named mod.rs; name it after its directory",
        ));
    }
    if is_test_file(path) {
        return findings;
    }
    let production = production(text);
    let code = production.iter().filter(|(_, line)| is_code(line)).count();
    if code > FILE_LINES_MAX {
        let message = format!("has {code} lines of code, at most {FILE_LINES_MAX}; split it");
        findings.push(finding(path, 0, message));
    }
    for (line, name, length) in functions(&production) {
        if length > FUNCTION_LINES_MAX {
            let message = format!("{name} has {length} lines, at most {FUNCTION_LINES_MAX}");
            findings.push(finding(path, line, message));
        }
    }
    if !may_be_unsafe(path) {
        let lines = production.iter().filter(|(_, line)| is_unsafe(line));
        findings.extend(lines.map(|(line, _)| finding(path, *line, "unsafe outside of a sys.rs")));
    }
    findings
}

/// Checks a crate's or the workspace's manifest.
pub(crate) fn check_manifest(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let crate_name = path
        .strip_prefix("crates/")
        .and_then(|rest| rest.strip_suffix("/Cargo.toml"));
    let of = |table: &[(&str, &'static [&'static str])]| {
        let found = table.iter().find(|(name, _)| Some(*name) == crate_name);
        found.map(|(_, names)| *names)
    };
    let (allowed, foreign) = (of(EDGES), of(FOREIGN).unwrap_or_default());
    if crate_name.is_some() && allowed.is_none() {
        findings.push(finding(
            path,
            0,
            "is a crate that has no place in the house yet",
        ));
    }
    let mut previous = "";
    for (line, table, name) in dependencies(text) {
        if !name.is_empty() && name < previous {
            findings.push(finding(
                path,
                line,
                format!("{name} belongs before {previous}"),
            ));
        }
        previous = name;
        if table != "dependencies" {
            continue;
        }
        let below = name.strip_prefix("forkd-");
        let known = below.is_none_or(|below| allowed.is_none_or(|names| names.contains(&below)));
        if !known || foreign.contains(&name) {
            findings.push(finding(path, line, format!("must not depend on {name}")));
        }
    }
    findings
}

/// `(line, table, name)` of each dependency. A blank line or another table begins a new group: its
/// first name is empty.
fn dependencies(text: &str) -> Vec<(usize, &str, &str)> {
    let mut found = Vec::new();
    let mut table = "";
    for (number, line) in numbered(text) {
        if let Some(header) = line.strip_prefix('[') {
            table = header
                .trim_end_matches(']')
                .trim_start_matches("workspace.");
        }
        if !table.ends_with("dependencies") || line.starts_with(['#', ' ', ']', '}']) {
            continue;
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
        found.push((number, table, if line.starts_with('[') { "" } else { name }));
    }
    found
}

/// Names of tests do not matter to production.
fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/") || path.contains("/fuzz/")
}

fn may_be_unsafe(path: &str) -> bool {
    path.ends_with("/sys.rs") || UNSAFE_FILES.contains(&path)
}

fn is_unsafe(line: &str) -> bool {
    let code = without_strings(line);
    let allows = code.contains("allow(unsafe_code");
    allows || (is_code(line) && words(&code).any(|word| word == "unsafe"))
}

fn is_code(line: &str) -> bool {
    let line = line.trim_start();
    !line.is_empty() && !line.starts_with("//")
}

/// The lines outside of `#[cfg(test)]` modules.
fn production(text: &str) -> Vec<(usize, &str)> {
    let mut kept = Vec::new();
    let mut lines = numbered(text).peekable();
    while let Some((number, line)) = lines.next() {
        let is_module = |next: &str| words(next).any(|word| word == "mod");
        let next_is_module = lines.peek().is_some_and(|(_, next)| is_module(next));
        if line.trim() != "#[cfg(test)]" || !next_is_module {
            kept.push((number, line));
            continue;
        }
        let opening = lines.next().map_or("", |(_, line)| line);
        if opening.ends_with('{') {
            let closing = format!("{}}}", indent(opening));
            lines.by_ref().find(|(_, line)| *line == closing);
        }
    }
    kept
}

/// `(line, name, length)` of each function with a body. rustfmt puts its closing brace under its
/// first line.
fn functions<'a>(lines: &[(usize, &'a str)]) -> Vec<(usize, &'a str, usize)> {
    let mut found = Vec::new();
    for (at, (number, line)) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        let closing = format!("{}}}", indent(line));
        let ending = format!("{};", indent(line));
        let rest = lines[at..].iter();
        let end = rest.clone().find(|(_, line)| {
            *line == closing
                || (line.starts_with(&ending)
                    || line.ends_with(';') && function_name(line).is_some())
        });
        if let Some((end, text)) = end
            && *text == closing
        {
            found.push((*number, name, end - number + 1));
        }
    }
    found
}

fn function_name(line: &str) -> Option<&str> {
    let code = line.trim_start();
    let (before, after) = code.split_once("fn ")?;
    let is_qualifier = |word: &str| {
        matches!(
            word,
            "pub" | "const" | "async" | "unsafe" | "extern" | "\"C\"" | "default"
        ) || word.starts_with("pub(")
    };
    let signature = before
        .split_ascii_whitespace()
        .all(|word| is_qualifier(word) || word.ends_with(')'));
    let name = after
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .next();
    name.filter(|name| signature && !name.is_empty())
}

fn indent(line: &str) -> &str {
    &line[..line.len() - line.trim_start().len()]
}

/// The line without what stands in double quotes or after `//`.
fn without_strings(line: &str) -> String {
    let mut code = String::new();
    let (mut quoted, mut escaped) = (false, false);
    for c in line.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if quoted => {}
            _ => code.push(c),
        }
        if code.ends_with("//") {
            break;
        }
    }
    code
}

/// Whether a line names a path, or something in it, and not just a longer word.
fn has_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + path.len()..]);
        let joins = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
        !before.ends_with(|c| joins(c) || matches!(c, '/' | '}')) && !after.starts_with(joins)
    })
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line))
}
