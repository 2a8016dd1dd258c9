//! Reads every file of the repository and applies the rules of `tidy`. The list of exceptions may
//! only get shorter: one that is no longer needed fails, too.
#![allow(clippy::unwrap_used, reason = "all of it is a test, helpers included")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tidy::{BLOB_BYTES_MAX, Finding, check_manifest, check_rust, check_text};

#[path = "../src/tidy.rs"]
mod tidy;

/// Findings that are known: path and the beginning of the message. Never add to it.
const NAUGHTY: &[(&str, &str)] = &[];

/// Parents of a checkout that are no secret.
const COMMON_PARENTS: &[&str] = &[
    "/",
    "/app",
    "/build",
    "/builds",
    "/home",
    "/mnt",
    "/opt",
    "/repo",
    "/root",
    "/src",
    "/srv",
    "/tmp",
    "/usr",
    "/usr/src",
    "/var",
    "/workspace",
];

fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap().to_owned()
}

/// Tracked files; without git, as in an unpacked archive, all but build products.
fn files(root: &Path) -> Vec<String> {
    let mut git = Command::new("git");
    git.arg("-C").arg(root).args(["ls-files", "-z"]);
    if let Ok(output) = git.output()
        && output.status.success()
    {
        let names = String::from_utf8(output.stdout).unwrap();
        let names = names.split_terminator('\0').map(str::to_owned);
        return names.filter(|name| root.join(name).is_file()).collect();
    }
    let mut found = Vec::new();
    walk(root, root, &mut found);
    found
}

fn walk(root: &Path, dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name());
        if name == "target" || name == ".git" || name == "node_modules" {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            walk(root, &path, found);
        } else {
            found.push(
                path.strip_prefix(root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned(),
            );
        }
    }
}

/// Where this checkout is, and its builds go: true on one machine only.
fn local_paths(root: &Path) -> Vec<String> {
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_default();
    let home = std::env::var("HOME").unwrap_or_default();
    let parent = root.parent().unwrap_or(root).to_string_lossy().into_owned();
    let mut paths = vec![root.to_string_lossy().into_owned(), target, home, parent];
    paths.retain(|path| path.starts_with('/') && !COMMON_PARENTS.contains(&path.as_str()));
    paths
}

fn check_file(root: &Path, name: &str, local_paths: &[String]) -> Vec<Finding> {
    let bytes = fs::read(root.join(name)).unwrap();
    if bytes.len() as u64 > BLOB_BYTES_MAX {
        let message = format!("has {} bytes, at most {BLOB_BYTES_MAX}", bytes.len());
        return vec![Finding {
            path: name.to_owned(),
            line: 0,
            message,
        }];
    }
    let Ok(text) = String::from_utf8(bytes) else {
        return Vec::new();
    };
    let mut findings = check_text(name, &text, local_paths);
    if name.ends_with(".rs") {
        findings.extend(check_rust(name, &text));
    }
    if name.ends_with("Cargo.toml") {
        findings.extend(check_manifest(name, &text));
    }
    findings
}

#[test]
fn repository_is_tidy() {
    let root = root();
    let (files, local_paths) = (files(&root), local_paths(&root));
    assert!(files.iter().any(|name| name == "Cargo.toml"), "{files:?}");
    let findings = files
        .iter()
        .flat_map(|name| check_file(&root, name, &local_paths));
    let findings: Vec<Finding> = findings.collect();
    let is = |finding: &Finding, known: &(&str, &str)| {
        finding.path == known.0 && finding.message.starts_with(known.1)
    };
    let new = findings
        .iter()
        .filter(|finding| !NAUGHTY.iter().any(|known| is(finding, known)));
    let new: Vec<String> = new.map(Finding::to_string).collect();
    let stale = NAUGHTY
        .iter()
        .filter(|known| !findings.iter().any(|finding| is(finding, known)));
    let stale: Vec<_> = stale.collect();
    assert!(
        new.is_empty(),
        "{} findings:\n{}",
        new.len(),
        new.join("\n")
    );
    assert!(
        stale.is_empty(),
        "no longer needed, remove them from the list: {stale:?}"
    );
}

/// The messages about a text, with their lines.
fn messages(findings: Vec<Finding>) -> Vec<(usize, String)> {
    findings
        .into_iter()
        .map(|finding| (finding.line, finding.message))
        .collect()
}

#[test]
fn texts_with_markers_and_local_paths_are_found() {
    let text = concat!(
        "a TO",
        "DO here\nFIX",
        "MELESS\nsee /x/y/z\nin /x/yes, in a/x/y\n<<<<<<< ours\n"
    );
    let found = messages(check_text("f", text, &["/x/y".to_owned()]));
    let lines: Vec<usize> = found.iter().map(|finding| finding.0).collect();
    assert_eq!(lines, [1, 3, 5]);
}

#[test]
fn rust_without_a_header_and_with_unsafe_is_found() {
    let text = "use x;\nfn f() {\n    let s = \"unsafe\"; // unsafe\n    unsafe { g() }\n}\n";
    let found = messages(check_rust("crates/a/src/b.rs", text));
    assert_eq!(
        found.iter().map(|finding| finding.0).collect::<Vec<_>>(),
        [1, 4]
    );
    assert_eq!(
        check_rust("crates/a/src/sys.rs", &format!("//! x\n{text}")),
        []
    );
    assert_eq!(check_rust("crates/a/src/b/mod.rs", "//! x\n").len(), 1);
}

#[test]
fn long_functions_and_files_are_found_without_their_tests() {
    let body = "    x();\n".repeat(tidy::FUNCTION_LINES_MAX - 1);
    let long =
        format!("//! x\ntrait T {{\n    fn short();\n}}\npub(crate) async fn f(\n) {{\n{body}}}\n");
    let found = messages(check_rust("a/b.rs", &long));
    assert_eq!(found, [(5, "f has 72 lines, at most 70".to_owned())]);
    let tests = format!(
        "//! x\n#[cfg(test)]\nmod tests {{\n{}}}\nfn g() {{\n    unsafe {{}}\n}}\n",
        body.repeat(9)
    );
    assert_eq!(messages(check_rust("a/b.rs", &tests)).len(), 1);
    let statics = "static X: u8 = 0;\n// a comment\n\n".repeat(tidy::FILE_LINES_MAX + 1);
    let found = messages(check_rust("a/b.rs", &format!("//! x\n{statics}")));
    assert!(found[0].1.starts_with("has 501 lines of code"), "{found:?}");
}

#[test]
fn forbidden_and_unsorted_dependencies_are_found() {
    let text = "[dependencies]\nforkd-engine.workspace = true\nblake3.workspace = true\n\
        tokio = { version = \"1\" }\n\n[dev-dependencies]\nproptest.workspace = true\n\
        forkd-sandbox.workspace = true\n";
    let found = messages(check_manifest("crates/snapshot/Cargo.toml", text));
    let lines: Vec<usize> = found.iter().map(|finding| finding.0).collect();
    assert_eq!(lines, [2, 3, 4, 8]);
    let unknown = check_manifest("crates/newcomer/Cargo.toml", "[dependencies]\n");
    assert_eq!(unknown.len(), 1);
    let workspace =
        "[workspace.dependencies]\nz = \"1\"\n\na = \"1\"\nb = \"1\"\n[profile.dev]\na = 1\n";
    assert_eq!(check_manifest("Cargo.toml", workspace), []);
}
