//! The WebSocket of `exec/ws`, over the client's own connections.

use axum::body::Body;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http::header::{AUTHORIZATION, CONNECTION, HeaderValue, UPGRADE};
use http::{Method, Request, StatusCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

pub use tokio_tungstenite::tungstenite::Message;

use super::web::Web;
use crate::failure::Failure;

type Stream = WebSocketStream<TokioIo<Upgraded>>;

/// An open WebSocket.
#[derive(Debug)]
pub struct Socket {
    stream: Stream,
}

/// The half that sends.
#[derive(Debug)]
pub struct Sender(SplitSink<Stream, Message>);

/// The half that receives.
#[derive(Debug)]
pub struct Receiver(SplitStream<Stream>);

impl Socket {
    /// The two halves, to be used by two tasks.
    pub fn split(self) -> (Sender, Receiver) {
        let (sink, stream) = self.stream.split();
        (Sender(sink), Receiver(stream))
    }
}

impl Sender {
    /// Sends one message.
    pub async fn send(&mut self, message: Message) -> Result<(), Failure> {
        self.0.send(message).await.map_err(|error| broken(&error))
    }
}

impl Receiver {
    /// The next text or binary message; `None` when the daemon has closed.
    pub async fn next(&mut self) -> Result<Option<Message>, Failure> {
        loop {
            match self.0.next().await {
                None | Some(Ok(Message::Close(_))) => return Ok(None),
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    return Ok(Some(message));
                }
                Some(Ok(_)) => (),
                Some(Err(error)) => return Err(broken(&error)),
            }
        }
    }
}

fn broken(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::caused("the connection to the daemon broke", error)
        .with_help("see the daemon's log; `forkd ls` shows what it still runs")
}

/// Opens a WebSocket at a path of the daemon.
pub(super) async fn open(
    web: &Web,
    token: Option<&HeaderValue>,
    path: &str,
) -> Result<Socket, Failure> {
    let key = generate_key();
    let mut request = Request::new(Body::empty());
    *request.method_mut() = Method::GET;
    *request.uri_mut() = web.uri(path)?;
    let headers = request.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert("sec-websocket-version", HeaderValue::from_static("13"));
    if let Ok(key) = HeaderValue::from_str(&key) {
        headers.insert("sec-websocket-key", key);
    }
    if let Some(token) = token {
        headers.insert(AUTHORIZATION, token.clone());
    }
    let response = web.send(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(super::refusal(response).await);
    }
    let accepted = response
        .headers()
        .get("sec-websocket-accept")
        .map(HeaderValue::as_bytes);
    if accepted != Some(derive_accept_key(key.as_bytes()).as_bytes()) {
        return Err(
            Failure::new(format!("{} answers, but is no forkd daemon", web.base()))
                .with_help("check --daemon-url, and proxies between here and the daemon"),
        );
    }
    let upgraded = hyper::upgrade::on(response)
        .await
        .map_err(|error| Failure::caused("the daemon did not open the stream", &error))?;
    let stream = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await;
    Ok(Socket { stream })
}
