//! A command on a WebSocket.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::world::{World, until};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn served() -> (World, String) {
    let world = World::new().await;
    let id = world.sandbox().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let router = world.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (world, format!("ws://{addr}/v1/sandboxes/{id}/exec/ws"))
}

async fn connect(url: &str) -> Socket {
    tokio_tungstenite::connect_async(url).await.unwrap().0
}

async fn say(socket: &mut Socket, message: Value) {
    socket
        .send(Message::Text(message.to_string().into()))
        .await
        .unwrap();
}

/// The next text or data frame.
async fn next(socket: &mut Socket) -> Message {
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

/// Everything up to the last text frame: output by stream, and that frame.
async fn rest(socket: &mut Socket) -> (Vec<u8>, Vec<u8>, Value) {
    let (mut out, mut err) = (vec![], vec![]);
    loop {
        match next(socket).await {
            Message::Binary(bytes) if bytes[0] == 1 => out.extend(&bytes[1..]),
            Message::Binary(bytes) if bytes[0] == 2 => err.extend(&bytes[1..]),
            Message::Text(text) => return (out, err, serde_json::from_str(&text).unwrap()),
            other => panic!("{other:?}"),
        }
    }
}

async fn start(url: &str, args: &[&str]) -> Socket {
    let mut socket = connect(url).await;
    say(
        &mut socket,
        json!({"type": "start", "args": args, "timeout_secs": 0}),
    )
    .await;
    let (_, _, started) = rest(&mut socket).await;
    assert_eq!(started["type"], "started", "{started}");
    socket
}

#[tokio::test]
async fn input_output_and_exit_status() {
    let (world, url) = served().await;
    let mut socket = start(&url, &["sh", "-c", "cat; echo err >&2; exit 5"]).await;
    for word in [&b"\0one "[..], b"\0two"] {
        socket
            .send(Message::Binary(word.to_vec().into()))
            .await
            .unwrap();
    }
    say(&mut socket, json!({"type": "close_stdin"})).await;
    let (out, err, last) = rest(&mut socket).await;
    assert_eq!(
        (out.as_slice(), err.as_slice()),
        (&b"one two"[..], &b"err\n"[..])
    );
    assert_eq!(last, json!({"type": "exit", "exit_code": 5}));
    assert!(matches!(next(&mut socket).await, Message::Close(_)));
    world.close().await;
}

#[tokio::test]
async fn signals_reach_the_command() {
    let (world, url) = served().await;
    let mut socket = start(&url, &["sleep", "60"]).await;
    say(&mut socket, json!({"type": "signal", "signal": "SIGTERM"})).await;
    let (_, _, last) = rest(&mut socket).await;
    assert_eq!(last["exit_code"], 143);
    world.close().await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_command_along() {
    let (world, url) = served().await;
    let processes = url.replace("exec/ws", "processes");
    let processes = &processes[processes.find("/v1/").unwrap()..];
    let socket = start(&url, &["sleep", "60"]).await;
    let running = world.get(processes).await.expect(200);
    assert_eq!(running.as_array().unwrap().len(), 1);
    drop(socket);
    until("the command ends", async || {
        world.get(processes).await.expect(200) == json!([])
    })
    .await;
    world.close().await;
}

#[tokio::test]
async fn frames_that_do_not_fit_are_refused() {
    let (world, url) = served().await;
    for first in [
        json!({"type": "close_stdin"}),
        json!({"type": "odd"}),
        json!({"type": "start", "args": []}),
    ] {
        let mut socket = connect(&url).await;
        say(&mut socket, first.clone()).await;
        let (_, _, last) = rest(&mut socket).await;
        assert_eq!(
            (&last["type"], &last["code"]),
            (&json!("error"), &json!("invalid_argument")),
            "{first}"
        );
    }
    let mut socket = connect(&url).await;
    say(
        &mut socket,
        json!({"type": "start", "args": ["no-such-program"]}),
    )
    .await;
    let (_, _, last) = rest(&mut socket).await;
    assert_eq!(
        (&last["type"], &last["exit_code"]),
        (&json!("exit"), &json!(127))
    );
    let plain = world.get(&url[url.find("/v1/").unwrap()..]).await;
    assert_eq!(plain.refusal(400), "invalid_argument");
    world.close().await;
}
