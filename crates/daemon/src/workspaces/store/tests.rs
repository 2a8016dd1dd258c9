//! The record of workspaces: durable, strict, and unchanged by what fails.

use super::*;

fn record(name: &str) -> Record {
    Record {
        id: format!("ws-{name}"),
        name: name.parse().unwrap(),
        source: "base".parse().unwrap(),
        memory_limit_mib: Some(64),
        state: None,
        suspended: false,
        suspends: 0,
        removing: false,
        sandbox: Some("sb-1".parse().unwrap()),
        created_at_unix: 1,
        last_active_unix: 2,
    }
}

#[tokio::test]
async fn records_outlive_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.json");
    let store = Store::new(path.clone());
    store.put(record("a")).await.unwrap();
    store.put(record("b")).await.unwrap();
    store.remove(&"a".parse().unwrap()).await.unwrap();
    let again = Store::new(path);
    assert_eq!(again.all().await.unwrap(), [record("b")]);
    assert_eq!(again.find(&"a".parse().unwrap()).await.unwrap(), None);
}

#[tokio::test]
async fn damaged_and_newer_files_are_refused_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.json");
    for (text, code) in [
        ("{", ErrorCode::Corrupt),
        (r#"{"version":2,"workspaces":{}}"#, ErrorCode::Incompatible),
    ] {
        std::fs::write(&path, text).unwrap();
        let store = Store::new(path.clone());
        assert_eq!(store.put(record("a")).await.unwrap_err().code(), code);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

#[tokio::test]
async fn what_cannot_be_written_did_not_happen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("missing/w.json");
    let store = Store::new(path);
    assert!(store.put(record("a")).await.is_err());
    assert_eq!(store.all().await.unwrap(), []);
}
