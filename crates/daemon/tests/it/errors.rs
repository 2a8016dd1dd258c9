//! Every refusal has one shape.

use axum::body::Body;
use http::{Method, Request};
use serde_json::Value;

use crate::world::World;

#[tokio::test]
async fn malformed_requests_unknown_routes_and_wrong_methods() {
    let world = World::new().await;
    let json = |body: &str| {
        let request = Request::post("/v1/sandboxes").header("content-type", "application/json");
        request.body(Body::from(body.to_owned())).unwrap()
    };
    for body in [
        "",
        "{",
        "[]",
        "null",
        "{\"snapshot_tag\": 1}",
        "{\"n\": 1}",
        "\u{0}",
    ] {
        let answer = world.send(json(body)).await;
        assert_eq!(answer.refusal(400), "invalid_argument", "{body:?}");
    }
    let plain = Request::post("/v1/sandboxes")
        .body(Body::from("{}"))
        .unwrap();
    assert_eq!(
        world.send(plain).await.refusal(415),
        "unsupported_media_type"
    );
    let large = json(&format!("{{\"snapshot_tag\":\"{}\"}}", "x".repeat(3 << 20)));
    assert_eq!(world.send(large).await.refusal(413), "payload_too_large");
    for path in [
        "/",
        "/v1",
        "/v1/nothing",
        "/v2/sandboxes",
        "/healthz/x",
        "/V1/sandboxes",
    ] {
        assert_eq!(world.get(path).await.refusal(404), "not_found", "{path}");
    }
    for (method, path) in [
        (Method::PATCH, "/v1/sandboxes"),
        (Method::POST, "/healthz"),
        (Method::PUT, "/v1/snapshots/x/info"),
        (Method::DELETE, "/v1/workspaces"),
    ] {
        let answer = world.call(method.clone(), path, Value::Null).await;
        assert_eq!(answer.refusal(405), "method_not_allowed", "{method} {path}");
    }
    world.close().await;
}

#[tokio::test]
async fn path_tricks_reach_no_file() {
    let world = World::new().await;
    for name in [
        "..%2f..%2fetc",
        "%2e%2e",
        ".hidden",
        "a%00b",
        "-x",
        "%ff",
        "a%20b",
    ] {
        for path in [
            format!("/v1/snapshots/{name}/info"),
            format!("/v1/sandboxes/{name}"),
            format!("/v1/sandboxes/{name}/console"),
            format!("/v1/workspaces/{name}"),
        ] {
            assert_eq!(
                world.get(&path).await.refusal(400),
                "invalid_argument",
                "{path}"
            );
        }
        let path = format!("/v1/snapshots/{name}");
        assert_eq!(
            world.delete(&path).await.refusal(400),
            "invalid_argument",
            "{path}"
        );
    }
    world.close().await;
}

#[tokio::test]
async fn answers_carry_a_request_id() {
    let world = World::new().await;
    let own = world.get("/version").await.headers["x-request-id"].clone();
    assert_eq!(own.len(), 16);
    let brought = Request::get("/version")
        .header("x-request-id", "mine-1")
        .body(Body::empty());
    assert_eq!(
        world.send(brought.unwrap()).await.headers["x-request-id"],
        "mine-1"
    );
    let odd = Request::get("/nowhere")
        .header("x-request-id", "a b")
        .body(Body::empty())
        .unwrap();
    assert_ne!(world.send(odd).await.headers["x-request-id"], "a b");
    world.close().await;
}
