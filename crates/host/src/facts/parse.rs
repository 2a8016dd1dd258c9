//! The kernel's texts as values. Pure; unknown lines are passed over.

use std::path::PathBuf;

use super::{Cpu, Memory, Virtualization};

/// `/proc/cpuinfo`.
pub(super) fn cpu(text: &str) -> Cpu {
    let of = |key: &'static str| fields(text).filter(move |field| field.0 == key);
    let value = |key| of(key).map(|field| field.1).next().unwrap_or_default();
    let has = |flag: &str| {
        value("flags")
            .split_ascii_whitespace()
            .any(|word| word == flag)
    };
    let virtualization = if has("vmx") {
        Some(Virtualization::Vmx)
    } else {
        has("svm").then_some(Virtualization::Svm)
    };
    Cpu {
        model: value("model name").to_owned(),
        count: of("processor").count() as u32,
        virtualization,
        is_guest: has("hypervisor"),
    }
}

/// `/proc/meminfo`. Kernels before 3.14 do not say what is available; those count as full.
pub(super) fn memory(text: &str) -> Memory {
    let bytes = |key| {
        let mut found = fields(text).filter(|field| field.0 == key);
        let kib = found
            .next()
            .and_then(|field| number(field.1.trim_end_matches(" kB")));
        kib.unwrap_or(0) * 1024
    };
    Memory {
        total_bytes: bytes("MemTotal"),
        available_bytes: bytes("MemAvailable"),
    }
}

/// `/etc/os-release`.
pub(super) fn distribution(text: &str) -> Option<String> {
    let mut names = text
        .lines()
        .filter_map(|line| line.strip_prefix("PRETTY_NAME="));
    let name = names.next()?.trim_matches(['"', '\'']);
    (!name.is_empty()).then(|| name.to_owned())
}

/// `/proc/self/mountinfo`: where cgroup version 2 is, and which controllers version 1 holds.
///
/// Source: proc_pid_mountinfo(5). Fields: id, parent, device, root, mount point, options, any number
/// of tags, `-`, type, source, options of the file system.
pub(super) fn cgroup_mounts(text: &str) -> (Option<PathBuf>, Vec<String>) {
    let mut v2 = None;
    let mut v1 = Vec::new();
    for line in text.lines() {
        let Some((place, kind)) = line.split_once(" - ") else {
            continue;
        };
        let mount = place.split(' ').nth(4).unwrap_or_default();
        let mut kind = kind.split(' ');
        match kind.next() {
            Some("cgroup2") if v2.is_none() => v2 = Some(PathBuf::from(unescape(mount))),
            Some("cgroup") => v1.extend(v1_controllers(kind.nth(1).unwrap_or_default())),
            _ => {}
        }
    }
    (v2, v1)
}

/// The controllers among a version 1 mount's options.
fn v1_controllers(options: &str) -> impl Iterator<Item = String> {
    let no_controller = |option: &str| {
        matches!(
            option,
            "rw" | "ro" | "xattr" | "noprefix" | "clone_children"
        ) || option.contains('=')
    };
    let controllers = options
        .split(',')
        .filter(move |option| !no_controller(option));
    controllers.map(str::to_owned)
}

/// The kernel writes blanks and backslashes in paths as three octal digits.
fn unescape(path: &str) -> String {
    let pairs = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    let mut plain_path = path.to_owned();
    for (escaped, plain) in pairs {
        plain_path = plain_path.replace(escaped, plain);
    }
    plain_path
}

/// The first number of one or more digits that a version text holds, with what belongs to it.
pub(super) fn version(text: &str) -> Option<String> {
    let words = text.split(|c: char| c.is_whitespace() || matches!(c, '(' | ')' | ',' | '\''));
    let numbered = words.map(|word| word.trim_start_matches('v'));
    let mut versions = numbered
        .filter(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'));
    versions.next().map(str::to_owned)
}

/// Words between white space.
pub(super) fn words(text: &str) -> Vec<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

/// A decimal number alone.
pub(super) fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// `key : value` lines.
fn fields(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(key, value)| (key.trim(), value.trim()))
}
