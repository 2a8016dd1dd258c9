//! Keeps the checked-in description of the interface, and the generated parts of its documentation, equal to
//! the code. `FORKD_REWRITE=1` rewrites them.

use std::fmt::Write as _;
use std::path::PathBuf;

use forkd_wire::error::ErrorCode;
use serde_json::Value;

use super::*;

fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

fn check(path: &str, expected: &str) {
    let path = repository(path);
    if std::env::var_os("FORKD_REWRITE").is_some() {
        std::fs::write(&path, expected).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "{} differs from the code; FORKD_REWRITE=1 cargo test -p forkd-daemon --lib openapi rewrites it",
        path.display()
    );
}

/// Replaces what stands between the markers of a generated part.
fn with_part(text: &str, name: &str, part: &str) -> String {
    let begin = format!("<!-- generated: {name} -->\n");
    let end = format!("<!-- end: {name} -->");
    let from = text.find(&begin).expect("the part's begin is marked") + begin.len();
    let to = from + text[from..].find(&end).expect("the part's end is marked");
    format!("{}{part}{}", &text[..from], &text[to..])
}

fn operations() -> Vec<(String, String, Value)> {
    let document: Value = serde_json::from_str(&document_json()).unwrap();
    let mut found = vec![];
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            found.push((path.clone(), method.to_uppercase(), operation.clone()));
        }
    }
    found.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    found
}

fn routes_table() -> String {
    let mut table =
        "| method | path | scope | what it does |\n| --- | --- | --- | --- |\n".to_owned();
    for (path, method, operation) in operations() {
        let scope = match path.as_str() {
            "/healthz" | "/readyz" => "none".to_owned(),
            _ => crate::auth::needed(&method.parse().unwrap(), &path).to_string(),
        };
        let summary = operation["summary"].as_str().unwrap();
        writeln!(table, "| {method} | `{path}` | {scope} | {summary} |").unwrap();
    }
    table
}

fn errors_table() -> String {
    let mut table = "| code | status |\n| --- | --- |\n".to_owned();
    for code in ErrorCode::ALL {
        writeln!(table, "| `{}` | {} |", code.as_str(), code.status()).unwrap();
    }
    table
}

#[test]
fn the_document_is_checked_in() {
    check("openapi/v1.json", &document_json());
}

#[test]
fn the_documentations_tables_are_current() {
    let path = "docs/api.md";
    let text = std::fs::read_to_string(repository(path)).unwrap();
    let text = with_part(&text, "routes", &routes_table());
    check(path, &with_part(&text, "errors", &errors_table()));
}

#[test]
fn every_operation_says_what_it_does_and_how_it_fails() {
    for (path, method, operation) in operations() {
        assert!(
            operation["summary"].is_string(),
            "{method} {path} has no summary"
        );
        assert!(
            operation["operationId"].is_string(),
            "{method} {path} has no id"
        );
        if path != "/healthz" {
            let answers = operation["responses"].as_object().unwrap();
            for status in ["400", "401", "404", "500"] {
                assert!(
                    answers.contains_key(status),
                    "{method} {path} lacks {status}"
                );
            }
        }
    }
}

#[test]
fn operation_ids_are_distinct() {
    let ids: Vec<String> = operations()
        .iter()
        .map(|(.., op)| op["operationId"].to_string())
        .collect();
    let mut distinct = ids.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), ids.len(), "{ids:?}");
}

#[test]
fn every_reference_leads_somewhere() {
    let document: Value = serde_json::from_str(&document_json()).unwrap();
    let text = document.to_string();
    for part in text.split("\"$ref\":\"").skip(1) {
        let target = part.split('"').next().unwrap().trim_start_matches('#');
        assert!(document.pointer(target).is_some(), "{target} is not there");
    }
}
