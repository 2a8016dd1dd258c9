//! Who may do what: every operation of the checked-in interface, with every kind of caller.

use std::path::Path;

use axum::body::Body;
use http::{Method, Request};
use serde_json::Value;

use crate::world::{World, token};

/// Method and path of every operation, with something in place of the variables.
fn operations() -> Vec<(Method, String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/v1.json");
    let document: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut found = vec![];
    for (route, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let path = route.replace("{pid}", "1");
            let path = path
                .replace("{id}", "x")
                .replace("{tag}", "x")
                .replace("{name}", "x");
            found.push((method.to_uppercase().parse().unwrap(), path, route.clone()));
        }
    }
    assert!(found.len() > 35, "{}", found.len());
    found
}

fn ask(method: &Method, path: &str, token: Option<&str>) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    request.body(Body::empty()).unwrap()
}

#[tokio::test]
async fn without_a_good_token_nothing_is_told() {
    let world = World::guarded().await;
    for (method, path, _) in operations() {
        if matches!(path.as_str(), "/healthz" | "/readyz") {
            continue;
        }
        for token in [None, Some("wrong"), Some("token-with-scope-rea"), Some("")] {
            let answer = world.send(ask(&method, &path, token)).await;
            assert_eq!(
                answer.refusal(401),
                "unauthorized",
                "{method} {path} {token:?}"
            );
        }
    }
    let unknown = world.send(ask(&Method::GET, "/nowhere", None)).await;
    assert_eq!(unknown.refusal(401), "unauthorized");
    let missing = world.send(ask(&Method::GET, "/version", None)).await.json();
    assert_eq!(missing["error"], "missing bearer token");
    let invalid = world
        .send(ask(&Method::GET, "/version", Some("no")))
        .await
        .json();
    assert_eq!(invalid["error"], "invalid bearer token");
    world.close().await;
}

#[tokio::test]
async fn probes_need_no_token_and_learn_little() {
    let world = World::guarded().await;
    for path in ["/healthz", "/healthz/"] {
        let answer = world.send(ask(&Method::GET, path, None)).await;
        assert_eq!(answer.text(), "{\"ok\":true}");
    }
    let ready = world
        .send(ask(&Method::GET, "/readyz", None))
        .await
        .expect(200);
    assert_eq!(ready.to_string(), "{\"checks\":[],\"ready\":true}");
    let ready = world
        .send(ask(&Method::GET, "/readyz", Some(&token("read"))))
        .await
        .expect(200);
    assert!(!ready["checks"].as_array().unwrap().is_empty());
    for path in ["/Healthz", "/healthz//", "/healthz%2f"] {
        let answer = world.send(ask(&Method::GET, path, None)).await;
        assert_eq!(answer.refusal(401), "unauthorized", "{path}");
    }
    world.close().await;
}

#[tokio::test]
async fn scopes_bound_what_a_token_may_do() {
    let world = World::guarded().await;
    let scopes = ["read", "use", "admin"];
    let mut forbidden = 0;
    for (method, path, route) in operations() {
        if matches!(path.as_str(), "/healthz" | "/readyz") {
            continue;
        }
        let mut refused = vec![];
        for scope in scopes {
            let answer = world.send(ask(&method, &path, Some(&token(scope)))).await;
            assert_ne!(answer.status, 401, "{method} {path} {scope}");
            if answer.status == 403 {
                assert_eq!(answer.refusal(403), "forbidden");
                refused.push(scope);
            }
        }
        let expected: &[&str] = match (method.as_str(), route.as_str()) {
            ("POST" | "DELETE", route) if route.starts_with("/v1/snapshots") => &["read", "use"],
            ("GET", route)
                if !["/files", "/exec", "/console", "/processes"]
                    .iter()
                    .any(|p| route.contains(p)) =>
            {
                &[]
            }
            _ => &["read"],
        };
        assert_eq!(refused, expected, "{method} {route}");
        forbidden += refused.len();
    }
    assert!(forbidden > 20);
    world.close().await;
}

#[tokio::test]
async fn every_request_is_written_down_and_no_secret_with_it() {
    let world = World::guarded().await;
    let mut asked = vec![];
    for (method, path, _) in operations() {
        for token in [None, Some(token("admin"))] {
            let uri = format!("{path}?path=/sentinel-query");
            world.send(ask(&method, &uri, token.as_deref())).await;
            asked.push((method.to_string(), path.clone(), token.map(|_| "admin")));
        }
    }
    let text = std::fs::read_to_string(world.paths.data.join("audit.log")).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), asked.len());
    for (line, (method, path, actor)) in lines.iter().zip(asked) {
        assert_eq!(line["method"], method.as_str());
        assert_eq!(line["path"], path.as_str());
        assert_eq!(line["actor"].as_str(), actor);
        assert!(
            line["status"].as_u64().unwrap() >= 200 && line["latency_us"].is_u64(),
            "{line}"
        );
        assert!(line["request_id"].is_string() && line["ts"].is_string());
    }
    assert!(
        !text.contains("sentinel") && !text.contains("token-with-scope"),
        "{text}"
    );
    world.close().await;
}
