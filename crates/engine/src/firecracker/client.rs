//! Requests to Firecracker's API socket, each on a connection of its own: whoever comes later, another daemon even,
//! finds nothing half said. What they mean is in `request`.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HOST};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::request::{Request, parse_fault};

/// The longest answer that is read.
const ANSWER_MAX: usize = 1 << 20;
const JSON: &str = "application/json";

/// Why a request has no answer.
#[derive(Debug)]
pub(super) enum Error {
    /// Firecracker closed the connection, or there is none.
    Closed,
    /// Firecracker refused, in its words.
    Refused(String),
    /// Firecracker did not answer within the request's deadline.
    Late,
}

/// Asks, and waits for the answer no longer than the request's deadline.
pub(super) async fn ask(stream: UnixStream, request: &Request<'_>) -> Result<Bytes, Error> {
    match tokio::time::timeout(request.deadline(), exchange(stream, request)).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::Late),
    }
}

async fn exchange(stream: UnixStream, request: &Request<'_>) -> Result<Bytes, Error> {
    let (method, path, body) = request.encode();
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let message = http::Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost")
        .header(ACCEPT, JSON)
        .header(CONTENT_TYPE, JSON)
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| Error::Refused(error.to_string()))?;
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|_| Error::Closed)?;
    let talk = async {
        let answer = sender.send_request(message).await.ok()?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
        Some((status, body.ok()?.to_bytes()))
    };
    tokio::pin!(talk);
    // The connection moves the bytes; when it has ended, what was answered is there.
    let answer = tokio::select! {
        answer = &mut talk => answer,
        _ = connection => talk.await,
    };
    match answer {
        Some((status, body)) if status.is_success() => Ok(body),
        Some((_, body)) => Err(Error::Refused(parse_fault(&body))),
        None => Err(Error::Closed),
    }
}
