//! What other clients of the protocol send, byte by byte, over HTTP/1.1.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::world::World;

async fn ask(world: &World, head: &str, body: &[u8]) -> String {
    let mut stream = UnixStream::connect(&world.dial.path).await.unwrap();
    let head = format!(
        "{head} HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    let kind = match head.contains("content-type") {
        true => "",
        false => "content-type: application/json\r\n",
    };
    stream
        .write_all(format!("{head}{kind}\r\n").as_bytes())
        .await
        .unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

async fn ask_as(world: &World, path: &str, kind: &str, body: &[u8]) -> String {
    let mut stream = UnixStream::connect(&world.dial.path).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-type: {kind}\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn health_is_plain_json() {
    let world = World::new().await;
    let answer = ask(&world, "GET /health", b"").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("\"protocol\":1"), "{answer}");
    assert!(ask(&world, "GET /envs", b"").await.contains("\"PATH\""));
}

#[tokio::test]
async fn malformed_requests_are_invalid_arguments() {
    let world = World::new().await;
    for body in [
        &b"{"[..],
        b"[]",
        b"{\"process\":{}}",
        b"\xff\xfe",
        b"nonsense",
    ] {
        let answer = ask(&world, "POST /process.Process/SendSignal", body).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        assert!(answer.contains("\"code\":\"invalid_argument\""), "{answer}");
    }
    let answer = ask_as(&world, "/process.Process/List", "application/proto", b"").await;
    assert!(
        answer.contains("invalid_argument") && answer.contains("application/json"),
        "{answer}"
    );
    let answer = ask(&world, "POST /no.Such/Service", b"{}").await;
    assert!(answer.starts_with("HTTP/1.1 501"), "{answer}");
    let answer = ask(&world, "POST /filesystem.Filesystem/WatchDir", b"{}").await;
    assert!(answer.contains("unimplemented"), "{answer}");
}

#[tokio::test]
async fn a_stock_client_starts_a_process() {
    let world = World::new().await;
    let json = br#"{"process":{"cmd":"/bin/sh","args":["-c","echo hi"],"envs":{}},"stdin":false}"#;
    let mut body = vec![0, 0, 0, 0, u8::try_from(json.len()).unwrap()];
    body.extend_from_slice(json);
    let answer = ask_as(
        &world,
        "/process.Process/Start",
        "application/connect+json",
        &body,
    )
    .await;
    assert!(
        answer.contains("{\"event\":{\"start\":{\"pid\":"),
        "{answer}"
    );
    assert!(
        answer.contains("{\"event\":{\"data\":{\"stdout\":\"aGkK\"}}}"),
        "{answer}"
    );
    assert!(
        answer.contains("\"exitCode\":0,\"exited\":true,\"status\":\"exit status 0\""),
        "{answer}"
    );
    // A message longer than anybody sends is refused by its head.
    let answer = ask_as(
        &world,
        "/process.Process/Start",
        "application/connect+json",
        &[0, 255, 0, 0, 0],
    )
    .await;
    assert!(answer.contains("invalid_argument"), "{answer}");
}

#[tokio::test]
async fn a_form_uploads_files() {
    let world = World::new().await;
    let body =
        b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"form.txt\"\r\n\r\n\
        line\r\n\r\n--b--\r\n";
    let answer = ask_as(&world, "/files", "multipart/form-data; boundary=b", body).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let path = answer
        .split("\"path\":\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap();
    assert!(path.ends_with("/form.txt"), "{path}");
    assert_eq!(std::fs::read(path).unwrap(), b"line\r\n");
    std::fs::remove_file(path).unwrap();
    let answer = ask_as(
        &world,
        "/files",
        "multipart/form-data; boundary=b",
        b"--b\r\n\r\nhalf",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}
