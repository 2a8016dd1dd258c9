//! Workspaces.

use serde_json::{Value, json};

use crate::world::World;

async fn world() -> World {
    let world = World::new().await;
    world.snapshot("base").await;
    world
}

#[tokio::test]
async fn sleeps_wakes_and_goes() {
    let mut world = world().await;
    let made = world
        .post(
            "/v1/workspaces",
            json!({"name": "w", "snapshot_tag": "base"}),
        )
        .await;
    let made = made.expect(201);
    assert_eq!(
        (&made["status"], &made["source_snapshot_tag"]),
        (&json!("running"), &json!("base"))
    );
    assert!(made["id"].as_str().unwrap().starts_with("ws-"));
    let live = made["live_sandbox_id"].as_str().unwrap().to_owned();

    for round in 0..2 {
        let slept = world
            .post("/v1/workspaces/w/suspend", json!({"diff": round == 1}))
            .await;
        let slept = slept.expect(200);
        assert_eq!(
            (&slept["status"], &slept["live_sandbox_id"]),
            (&json!("suspended"), &Value::Null)
        );
        let again = world.post("/v1/workspaces/w/suspend", json!({})).await;
        assert_eq!(again.refusal(400), "not_ready");
        if round == 0 {
            assert_eq!(
                world
                    .get(&format!("/v1/sandboxes/{live}"))
                    .await
                    .refusal(404),
                "not_found"
            );
            world.restart().await;
        }
        let woken = world
            .post("/v1/workspaces/w/resume", Value::Null)
            .await
            .expect(200);
        assert_eq!(woken["status"], "running");
        let again = world.post("/v1/workspaces/w/resume", Value::Null).await;
        assert_eq!(again.refusal(400), "not_ready");
    }
    assert_eq!(
        world
            .get("/v1/workspaces")
            .await
            .expect(200)
            .as_array()
            .unwrap()
            .len(),
        1
    );
    world.delete("/v1/workspaces/w").await.expect(204);
    assert_eq!(
        world.get("/v1/workspaces/w").await.refusal(404),
        "not_found"
    );
    assert_eq!(world.get("/v1/sandboxes").await.expect(200), json!([]));
    let left = world.get("/v1/snapshots").await.expect(200);
    let tags: Vec<&Value> = left.as_array().unwrap().iter().map(|s| &s["tag"]).collect();
    assert_eq!(tags, [&json!("base")]);
    world.close().await;
}

#[tokio::test]
async fn a_dead_sandbox_makes_it_stale_and_it_can_go_on() {
    let world = world().await;
    let made = world
        .post(
            "/v1/workspaces",
            json!({"name": "w", "snapshot_tag": "base"}),
        )
        .await;
    let live = made.expect(201)["live_sandbox_id"]
        .as_str()
        .unwrap()
        .to_owned();
    world
        .delete(&format!("/v1/sandboxes/{live}"))
        .await
        .expect(204);
    assert_eq!(
        world.get("/v1/workspaces/w").await.expect(200)["status"],
        "stale"
    );
    let suspend = world.post("/v1/workspaces/w/suspend", json!({})).await;
    assert_eq!(suspend.refusal(400), "not_ready");
    let woken = world
        .post("/v1/workspaces/w/resume", Value::Null)
        .await
        .expect(200);
    assert_eq!(woken["status"], "running");
    world.close().await;
}

#[tokio::test]
async fn names_are_checked_and_unique() {
    let world = world().await;
    let create = async |name: &str, tag: &str| {
        world
            .post("/v1/workspaces", json!({"name": name, "snapshot_tag": tag}))
            .await
    };
    create("w", "base").await.expect(201);
    assert_eq!(create("w", "base").await.refusal(409), "already_exists");
    assert_eq!(
        create("../w", "base").await.refusal(400),
        "invalid_argument"
    );
    assert_eq!(
        create(&"x".repeat(60), "base").await.refusal(400),
        "invalid_argument"
    );
    assert_eq!(create("v", "nobody").await.refusal(404), "not_found");
    assert_eq!(
        world
            .get("/v1/workspaces")
            .await
            .expect(200)
            .as_array()
            .unwrap()
            .len(),
        1
    );
    world.close().await;
}
