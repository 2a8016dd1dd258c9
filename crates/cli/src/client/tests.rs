//! The client against small servers.

use axum::Json;
use axum::routing::get;
use serde_json::json;

use super::*;

fn embedded(router: Router) -> Client {
    Client::embedded(router)
}

#[tokio::test]
async fn a_refusal_is_passed_on() {
    let refuse = || async {
        let body = json!({"error": "no such tag", "code": "not_found", "remedy": "make it"});
        (StatusCode::NOT_FOUND, Json(body))
    };
    let client = embedded(Router::new().route("/x", get(refuse)));
    let failure = client
        .json::<serde_json::Value>(Method::GET, "/x")
        .await
        .unwrap_err();
    assert_eq!(failure.message(), "no such tag");
    assert_eq!(failure.help(), Some("make it"));
    assert_eq!(failure.code(), Some(ErrorCode::NotFound));
}

#[tokio::test]
async fn when_to_try_again_is_told() {
    let refuse = |remedy: Option<&'static str>| {
        let body = json!({"error": "full", "code": "busy", "remedy": remedy});
        (
            StatusCode::TOO_MANY_REQUESTS,
            [(RETRY_AFTER, "7")],
            Json(body),
        )
    };
    let router = Router::new()
        .route("/x", get(move || async move { refuse(None) }))
        .route("/y", get(move || async move { refuse(Some("kill some")) }));
    let client = embedded(router);
    for (path, help) in [
        ("/x", "try again in 7 s"),
        ("/y", "kill some; the same may work in 7 s"),
    ] {
        let failure = client.json::<()>(Method::GET, path).await.unwrap_err();
        assert_eq!(failure.help(), Some(help));
    }
}

#[tokio::test]
async fn what_is_no_daemon_is_told() {
    let router = Router::new().route("/x", get(|| async { (StatusCode::BAD_GATEWAY, "oh\n<b>") }));
    let failure = embedded(router)
        .json::<()>(Method::GET, "/x")
        .await
        .unwrap_err();
    assert!(failure.message().contains("502"), "{failure}");
    assert!(failure.help().is_some());
}

#[tokio::test]
async fn an_unreachable_daemon_says_how_to_start_one() {
    // Port 1 of the loopback is nobody's.
    let client = Client::web("http://127.0.0.1:1", None).unwrap();
    let failure = client.version().await.unwrap_err();
    assert!(
        failure.message().contains("http://127.0.0.1:1"),
        "{failure}"
    );
    assert!(failure.help().unwrap().contains("forkd serve"));
    assert!(!client.answers().await);
}

#[test]
fn addresses_are_checked() {
    for url in [
        "",
        "localhost:8889",
        "ftp://x",
        "http://",
        "unix:/run/x",
        "http://x/?a",
    ] {
        assert!(Client::web(url, None).is_err(), "{url}");
    }
    assert!(Client::web("https://node:8889/base/", Some("token")).is_ok());
    assert!(Client::web("http://x", Some("to\nken")).is_err());
    assert!(Client::web("http://[::1]:8889", None).unwrap().is_local());
    assert!(!Client::web("http://10.0.0.1", None).unwrap().is_local());
}

#[tokio::test]
async fn the_token_is_sent_and_not_shown() {
    let echo = |headers: http::HeaderMap| async move {
        headers[AUTHORIZATION].to_str().unwrap().to_owned()
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/x", get(echo));
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    let client = Client::web(&url, Some(" canary-7f3a ")).unwrap();
    let answer = client
        .stream(Method::GET, "/x", Body::empty(), None)
        .await
        .unwrap();
    assert_eq!(
        collect(answer.into_body()).await.unwrap(),
        "Bearer canary-7f3a"
    );
    assert!(!format!("{client:?}").contains("canary"));
    server.abort();
}
