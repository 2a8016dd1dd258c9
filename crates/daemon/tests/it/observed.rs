//! Metrics and the interface's description.

use std::collections::BTreeSet;
use std::path::Path;

use http::Method;
use serde_json::{Value, json};

use crate::world::World;

#[tokio::test]
async fn every_family_is_touched_and_documented() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/branch");
    world.post(&path, json!({"tag": "child"})).await.expect(201);
    world.get("/nowhere").await;
    let text = world.get("/metrics").await.text();

    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operations.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let families: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    for family in &families {
        assert!(
            docs.contains(&format!("`{family}`")),
            "{family} is not documented"
        );
    }
    // Families without a sample are left out of the text, so every documented one has been touched.
    for word in docs.split('`').filter(|word| word.starts_with("forkd_")) {
        assert!(families.contains(word), "{word} was never touched:\n{text}");
    }
    for line in [
        "forkd_snapshots_total 2",
        "forkd_sandboxes_active 1",
        "forkd_branches_in_flight 0",
        "forkd_branch_concurrency_cap 4",
        "forkd_sandboxes{state=\"running\"} 1",
        "forkd_errors_total{code=\"not_found\"} 1",
        "forkd_forks_total{result=\"ok\"} 1",
        "forkd_fork_stage_seconds_count{stage=\"ready\"} 1",
        "forkd_branch_pause_seconds_count 1",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in:\n{text}"
        );
    }
    assert!(text.contains("forkd_build_info{version=\""));
    assert!(!text.contains("nowhere"), "paths must not become labels");
    world.close().await;
}

#[tokio::test]
async fn the_interface_describes_itself() {
    let world = World::new().await;
    let served = world.get("/openapi.json").await.expect(200);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/v1.json");
    let checked_in: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(served, checked_in);
    let version = world
        .call(Method::GET, "/version", Value::Null)
        .await
        .expect(200);
    assert_eq!(
        (&version["api"], &version["engine"]),
        (&json!("v1"), &json!("host"))
    );
    world.close().await;
}
