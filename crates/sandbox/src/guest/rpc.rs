//! The Connect protocol, client side: unary calls and streams of messages, both bounded.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use forkd_wire::agent::connect::{
    Code, ENVELOPE, EndStream, STREAM_CONTENT_TYPE, UNARY_CONTENT_TYPE, envelope, read_envelope,
};
use http::header::CONTENT_TYPE;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Body, Client, Error, within};

/// The longest answer of a unary call, bytes: three texts of an eval at 1 MiB, escaped.
const MAX_ANSWER: usize = 24 << 20;
/// The longest error message that is kept, bytes.
const MAX_MESSAGE_TEXT: usize = 8 << 10;

/// A body that is there already.
pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A request to the agent.
pub(super) fn request(
    method: Method,
    path: &str,
    body: Body,
    what: &'static str,
) -> Result<Request<Body>, Error> {
    // The authority means nothing to the agent; HTTP/2 wants one.
    Request::builder()
        .method(method)
        .uri(format!("http://guest{path}"))
        .body(body)
        .map_err(|error| Error::Request {
            what,
            detail: error.to_string(),
        })
}

fn to_json<T: Serialize>(what: &'static str, message: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(message).map_err(|error| Error::Request {
        what,
        detail: error.to_string(),
    })
}

/// The request of a unary call.
pub(super) fn unary_request<T: Serialize>(
    what: &'static str,
    path: &str,
    message: &T,
) -> Result<Request<Body>, Error> {
    let mut request = request(Method::POST, path, full(to_json(what, message)?), what)?;
    let kind = http::HeaderValue::from_static(UNARY_CONTENT_TYPE);
    request.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(request)
}

/// The request of a server stream.
pub(super) fn stream_request<T: Serialize>(
    what: &'static str,
    path: &str,
    message: &T,
) -> Result<Request<Body>, Error> {
    let json = to_json(what, message)?;
    let mut bytes = envelope(json.len(), false).to_vec();
    bytes.extend_from_slice(&json);
    let mut request = request(Method::POST, path, full(bytes), what)?;
    let kind = http::HeaderValue::from_static(STREAM_CONTENT_TYPE);
    request.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(request)
}

/// Makes a unary call.
pub(super) async fn unary<A: DeserializeOwned>(
    client: &Client,
    what: &'static str,
    request: Request<Body>,
    deadline: Duration,
) -> Result<A, Error> {
    within(what, deadline, async {
        let response = check(what, client.send(what, request).await?).await?;
        let bytes = collect(what, response).await?;
        serde_json::from_slice(&bytes).map_err(|error| Error::protocol(what, error.to_string()))
    })
    .await
}

async fn collect(what: &'static str, response: Response<Incoming>) -> Result<Bytes, Error> {
    match Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
    {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => match error.downcast::<hyper::Error>() {
            Ok(source) => Err(Error::Lost {
                what,
                source: Some(*source),
            }),
            Err(_) => Err(Error::protocol(
                what,
                format!("it is longer than {MAX_ANSWER} bytes"),
            )),
        },
    }
}

/// The body of a refusal: Connect's, whose code is a name, or that of file transfers, whose code is the
/// status again.
#[derive(Debug, Deserialize)]
struct Refusal {
    #[serde(default)]
    code: serde_json::Value,
    #[serde(default)]
    message: String,
}

/// Turns an answer that is a refusal into an error.
pub(super) async fn check(
    what: &'static str,
    response: Response<Incoming>,
) -> Result<Response<Incoming>, Error> {
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(response);
    }
    let bytes = collect(what, response).await?;
    let Ok(refusal) = serde_json::from_slice::<Refusal>(&bytes) else {
        return Err(Error::protocol(
            what,
            format!("status {status} without a reason"),
        ));
    };
    let code = match refusal.code.as_str() {
        Some(name) => Code::from_name(name),
        None => code_of_status(status.as_u16()),
    };
    Err(refused(code, refusal.message))
}

fn code_of_status(status: u16) -> Code {
    match status {
        400 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::NotFound,
        409 => Code::AlreadyExists,
        429 | 507 => Code::ResourceExhausted,
        499 => Code::Canceled,
        504 => Code::DeadlineExceeded,
        _ => Code::Internal,
    }
}

fn refused(code: Code, mut message: String) -> Error {
    if message.len() > MAX_MESSAGE_TEXT {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_TEXT));
    }
    Error::Refused { code, message }
}

/// The messages of a server stream.
#[derive(Debug)]
pub(super) struct Messages {
    what: &'static str,
    body: Incoming,
    buf: BytesMut,
    ended: bool,
}

impl Messages {
    pub(super) fn new(what: &'static str, body: Incoming) -> Self {
        Self {
            what,
            body,
            buf: BytesMut::new(),
            ended: false,
        }
    }

    /// The next message, or `None` when the stream has ended well.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let what = self.what;
        if self.ended {
            return Ok(None);
        }
        loop {
            if let Some(head) = self.buf.first_chunk::<ENVELOPE>() {
                let (len, end) = read_envelope(*head)
                    .map_err(|error| Error::protocol(what, error.to_string()))?;
                if self.buf.len() >= ENVELOPE + len {
                    self.buf.advance(ENVELOPE);
                    let bytes = self.buf.split_to(len);
                    return self.take(&bytes, end);
                }
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buf.extend_from_slice(&data);
                    }
                }
                Some(Err(source)) => {
                    return Err(Error::Lost {
                        what,
                        source: Some(source),
                    });
                }
                None => return Err(Error::Lost { what, source: None }),
            }
        }
    }

    fn take<T: DeserializeOwned>(&mut self, bytes: &[u8], end: bool) -> Result<Option<T>, Error> {
        let what = self.what;
        let wrong = |error: serde_json::Error| Error::protocol(what, error.to_string());
        if !end {
            return serde_json::from_slice(bytes).map(Some).map_err(wrong);
        }
        self.ended = true;
        match serde_json::from_slice::<EndStream>(bytes)
            .map_err(wrong)?
            .error
        {
            None => Ok(None),
            Some(error) => Err(refused(Code::from_name(&error.code), error.message)),
        }
    }
}
