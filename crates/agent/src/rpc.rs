//! The Connect protocol, server side, JSON codec: unary calls, streams, and how calls fail.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use forkd_wire::agent::ConnectError;
use forkd_wire::agent::connect::{
    Code, ENVELOPE, EndStream, MAX_MESSAGE, STREAM_CONTENT_TYPE, UNARY_CONTENT_TYPE, envelope,
    read_envelope,
};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body as HttpBody, Frame, Incoming};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

/// What answers are made of.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;
/// An answer.
pub(crate) type Reply = Response<Body>;

/// The connection a request came over.
#[derive(Debug, Default)]
pub(crate) struct Connection {
    lost: AtomicBool,
}

impl Connection {
    /// The transport ended. Streams that end after this were not cancelled by their callers.
    pub(crate) fn set_lost(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Whether the transport has ended.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Why a call failed, for its caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Fault {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl Fault {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// A failed system call on `noun`, with the code that fits its error.
    pub(crate) fn io(step: &str, noun: &str, error: &io::Error) -> Self {
        use io::ErrorKind as Kind;
        let code = match error.kind() {
            Kind::NotFound => Code::NotFound,
            Kind::AlreadyExists => Code::AlreadyExists,
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => Code::PermissionDenied,
            Kind::StorageFull | Kind::QuotaExceeded | Kind::OutOfMemory | Kind::FileTooLarge => {
                Code::ResourceExhausted
            }
            Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::DirectoryNotEmpty
            | Kind::InvalidInput
            | Kind::InvalidFilename => Code::InvalidArgument,
            _ => Code::Internal,
        };
        Self::new(code, format!("cannot {step} {noun}: {error}"))
    }

    fn body(&self) -> ConnectError {
        ConnectError::new(self.code, self.message.clone())
    }

    /// The answer of a unary call that failed.
    pub(crate) fn unary(&self) -> Reply {
        let status = StatusCode::from_u16(self.code.status());
        json(
            status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            &self.body(),
        )
    }

    /// The last message of a stream that failed.
    pub(crate) fn end_stream(&self) -> Bytes {
        message(
            &EndStream {
                error: Some(self.body()),
            },
            true,
        )
    }

    /// The answer of a stream that failed before it began.
    pub(crate) fn stream(&self) -> Reply {
        stream_reply(full(self.end_stream()))
    }
}

/// A body that is there already.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// An answer in JSON.
pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Reply {
    // Our own types always serialise.
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    reply(status, UNARY_CONTENT_TYPE, full(bytes))
}

/// An answer of any type.
pub(crate) fn reply(status: StatusCode, content_type: &'static str, body: Body) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    reply
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    reply
}

/// The answer of a stream.
pub(crate) fn stream_reply(body: Body) -> Reply {
    reply(StatusCode::OK, STREAM_CONTENT_TYPE, body)
}

/// One message of a stream, with its envelope.
pub(crate) fn message<T: Serialize>(value: &T, end: bool) -> Bytes {
    let mut bytes = vec![0; ENVELOPE];
    // Writing our own types into memory does not fail.
    let _ = serde_json::to_writer(&mut bytes, value);
    let head = envelope(bytes.len() - ENVELOPE, end);
    bytes[..ENVELOPE].copy_from_slice(&head);
    bytes.into()
}

/// The last message of a stream that went well.
pub(crate) fn end_stream() -> Bytes {
    message(&EndStream::default(), true)
}

fn check_type(headers: &HeaderMap, wanted: &str) -> Result<(), Fault> {
    let given = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let plain = given.split(';').next().unwrap_or("").trim();
    if plain.eq_ignore_ascii_case(wanted) {
        return Ok(());
    }
    Err(Fault::invalid(format!(
        "content type {given:?} is not served here; send {wanted} (the JSON codec)"
    )))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(bytes).map_err(|error| {
        Fault::invalid(format!("the request is not what this call takes: {error}"))
    })
}

/// Reads the request of a unary call.
pub(crate) async fn read_unary<T: DeserializeOwned>(
    request: Request<Incoming>,
) -> Result<T, Fault> {
    check_type(request.headers(), UNARY_CONTENT_TYPE)?;
    let bytes = http_body_util::Limited::new(request.into_body(), MAX_MESSAGE)
        .collect()
        .await
        .map_err(|error| Fault::invalid(format!("cannot read the request: {error}")))?
        .to_bytes();
    // Connect lets an empty message be an empty body.
    parse(if bytes.is_empty() { b"{}" } else { &bytes })
}

/// Reads the only request of a server stream.
pub(crate) async fn read_first<T: DeserializeOwned>(
    request: Request<Incoming>,
) -> Result<T, Fault> {
    let mut messages = Messages::new(request)?;
    messages
        .next()
        .await?
        .ok_or_else(|| Fault::invalid("the request is missing"))
}

/// The requests of a client stream.
#[derive(Debug)]
pub(crate) struct Messages {
    body: Incoming,
    buf: BytesMut,
}

impl Messages {
    pub(crate) fn new(request: Request<Incoming>) -> Result<Self, Fault> {
        check_type(request.headers(), STREAM_CONTENT_TYPE)?;
        Ok(Self {
            body: request.into_body(),
            buf: BytesMut::new(),
        })
    }

    /// The next request, or `None` when the caller is done.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Fault> {
        loop {
            if let Some(head) = self.buf.first_chunk::<ENVELOPE>() {
                let (len, end) =
                    read_envelope(*head).map_err(|error| Fault::invalid(error.to_string()))?;
                if end {
                    return Ok(None);
                }
                if self.buf.len() >= ENVELOPE + len {
                    self.buf.advance(ENVELOPE);
                    return parse(&self.buf.split_to(len)).map(Some);
                }
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buf.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    return Err(Fault::new(
                        Code::Canceled,
                        format!("the request broke: {error}"),
                    ));
                }
                None if self.buf.is_empty() => return Ok(None),
                None => {
                    return Err(Fault::invalid(
                        "the request ends in the middle of a message",
                    ));
                }
            }
        }
    }
}

/// A body that another task writes. `G` is dropped with it, when all was sent or the caller left.
#[derive(Debug)]
pub(crate) struct ChannelBody<G> {
    receiver: mpsc::Receiver<Bytes>,
    _guard: G,
}

impl<G: Unpin + Send + 'static> ChannelBody<G> {
    pub(crate) fn boxed(receiver: mpsc::Receiver<Bytes>, guard: G) -> Body {
        Self {
            receiver,
            _guard: guard,
        }
        .boxed_unsync()
    }
}

impl<G: Unpin> HttpBody for ChannelBody<G> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.get_mut()
            .receiver
            .poll_recv(cx)
            .map(|item| item.map(|bytes| Ok(Frame::data(bytes))))
    }
}
