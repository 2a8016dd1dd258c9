//! Defaults of older clients, and shapes that programs rely on.

use serde_json::json;

use super::exec::{ClientMessage, Exec};
use super::sandbox::{BranchSandbox, CreateSandboxes, ForkResult};
use super::snapshot::CreateSnapshot;

#[test]
fn requests_of_older_clients_get_the_documented_defaults() {
    let body = json!({"snapshot_tag": "py", "unknown": 1});
    let create: CreateSandboxes = serde_json::from_value(body).unwrap();
    assert_eq!(create, CreateSandboxes::new("py".parse().unwrap(), 1));

    let exec: Exec = serde_json::from_value(json!({"args": ["true"]})).unwrap();
    assert_eq!(exec.timeout_secs, 30);

    let branch: BranchSandbox = serde_json::from_value(json!({})).unwrap();
    assert_eq!(branch, BranchSandbox::default());
    assert!(branch.wait);

    let body = json!({"tag": "t", "kernel": "/k", "rootfs": "/r"});
    let create: CreateSnapshot = serde_json::from_value(body).unwrap();
    assert_eq!((create.boot_wait_secs, create.memory_mib), (10, 512));
}

#[test]
fn a_fork_result_is_told_by_its_fields() {
    let failed = json!({"error": "no", "code": "busy"});
    assert!(matches!(
        serde_json::from_value(failed).unwrap(),
        ForkResult::Failed(_)
    ));
}

#[test]
fn websocket_frames_are_flat() {
    let frame = json!({"type": "start", "args": ["cat"], "timeout_secs": 0});
    let ClientMessage::Start(exec) = serde_json::from_value(frame).unwrap() else {
        panic!("not a start");
    };
    assert_eq!(exec.args, ["cat"]);
    let close = serde_json::to_value(ClientMessage::CloseStdin).unwrap();
    assert_eq!(close, json!({"type": "close_stdin"}));
}

#[test]
fn unsafe_names_do_not_parse() {
    for tag in ["../x", "", "a/b", ".hidden"] {
        let body = json!({"snapshot_tag": tag});
        assert!(
            serde_json::from_value::<CreateSandboxes>(body).is_err(),
            "{tag:?}"
        );
    }
}
