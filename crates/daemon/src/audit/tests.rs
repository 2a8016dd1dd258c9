//! Lines, rotation and bounds of the audit log.

use super::*;

fn entry() -> Entry<'static> {
    Entry {
        request_id: "r1",
        actor: Some("ci"),
        remote: Some("127.0.0.1:1".into()),
        method: "POST",
        path: "/v1/sandboxes",
        status: 201,
        latency: Duration::from_micros(1500),
        ua: Some("curl\n\"quoted\""),
    }
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_request_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/audit.log");
    let audit = Audit::to_file(&path).unwrap();
    audit.write(&entry()).unwrap();
    audit
        .write(&Entry {
            actor: None,
            ua: None,
            ..entry()
        })
        .unwrap();
    let lines = lines(&path);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["latency_us"], 1500);
    assert_eq!(lines[0]["ua"], "curl\n\"quoted\"");
    assert_eq!(lines[1]["actor"], serde_json::Value::Null);
    assert!(lines[0]["ts"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn a_rotated_log_is_opened_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.log");
    let audit = Audit::to_file(&path).unwrap();
    audit.write(&entry()).unwrap();
    std::fs::rename(&path, dir.path().join("audit.log.1")).unwrap();
    audit.reopen().unwrap();
    audit.write(&entry()).unwrap();
    assert_eq!(lines(&path).len(), 1);
}

#[test]
fn a_user_agent_is_shortened_between_characters() {
    assert_eq!(shortened(&"ä".repeat(300)).chars().count(), UA_LEN_MAX);
}
