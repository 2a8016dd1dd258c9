//! The agent's protocol, as a fake guest speaks it.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use forkd_wire::agent::connect::{Code, MAX_MESSAGE, UNARY_CONTENT_TYPE};
use forkd_wire::agent::{
    AGENT_PROTOCOL_VERSION, ConnectError, EVAL_PATH, EvalRequest, HEALTH_PATH, Health, RESUME_PATH,
    ResumeRequest, ResumeResponse, SHUTDOWN_PATH, filesystem, process as service,
};
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::DuplexStream;

use super::guest::Guest;
use super::{eval, files, process};

/// The largest file that can be written, bytes.
const BODY_MAX: usize = 64 << 20;

/// What answers are made of.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;
pub(super) type Answer = Result<Response<Body>, ConnectError>;

/// Serves one connection to its end.
pub(super) async fn serve(guest: Arc<Guest>, stream: DuplexStream, mute: bool) {
    let service = service_fn(move |request| {
        let guest = Arc::clone(&guest);
        async move {
            if mute {
                std::future::pending::<()>().await;
            }
            guest.runs().await;
            Ok::<_, Infallible>(answer(&guest, request).await)
        }
    });
    let server = auto::Builder::new(TokioExecutor::new());
    // Connections break; whoever dialled notices.
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(guest: &Arc<Guest>, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let body = match Limited::new(body, BODY_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let error = ConnectError::new(Code::ResourceExhausted, error.to_string());
            return refused(&error);
        }
    };
    // It may have been paused while the request came in.
    guest.runs().await;
    route(guest, &head, &body).unwrap_or_else(|error| refused(&error))
}

fn route(guest: &Arc<Guest>, head: &http::request::Parts, body: &Bytes) -> Answer {
    let path = head.uri.path();
    let query = head.uri.query().unwrap_or("");
    match (&head.method, path) {
        (&Method::GET, HEALTH_PATH) => json(&Health {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: AGENT_PROTOCOL_VERSION,
            kernel: "fake".to_owned(),
            python: Some("/usr/bin/python3".to_owned()),
        }),
        (&Method::GET, filesystem::FILES_PATH) => files::read(guest, query),
        (&Method::POST, filesystem::FILES_PATH) => files::write(guest, query, body),
        (&Method::POST, RESUME_PATH) => resume(guest, parse(body)?),
        (&Method::POST, EVAL_PATH) => {
            let request: EvalRequest = parse(body)?;
            json(&eval::run(&mut guest.state(), &request))
        }
        (&Method::POST, SHUTDOWN_PATH) => {
            let guest = Arc::clone(guest);
            // After the answer has left.
            tokio::spawn(async move {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                guest.end(crate::Exit::Code(0));
            });
            json(&serde_json::json!({}))
        }
        (&Method::POST, filesystem::STAT_PATH) => files::stat(guest, &parse(body)?),
        (&Method::POST, filesystem::LIST_DIR_PATH) => files::list(guest, &parse(body)?),
        (&Method::POST, filesystem::REMOVE_PATH) => files::remove(guest, &parse(body)?),
        (&Method::POST, filesystem::MAKE_DIR_PATH) => files::make_dir(guest, &parse(body)?),
        (&Method::POST, filesystem::MOVE_PATH) => files::rename(guest, &parse(body)?),
        (&Method::POST, service::START_PATH) => process::start(guest, body),
        (&Method::POST, service::CONNECT_PATH) => process::connect(guest, body),
        (&Method::POST, service::LIST_PATH) => json(&guest.processes.list()),
        (&Method::POST, service::SEND_INPUT_PATH) => guest.processes.input(parse(body)?),
        (&Method::POST, service::SEND_SIGNAL_PATH) => guest.processes.signal(&parse(body)?),
        (&Method::POST, service::CLOSE_STDIN_PATH) => guest.processes.close_input(&parse(body)?),
        _ => Err(ConnectError::new(
            Code::Unimplemented,
            format!("the fake guest has no {path}"),
        )),
    }
}

fn resume(guest: &Guest, request: ResumeRequest) -> Answer {
    let entropy = request.entropy_bytes();
    entropy.map_err(|error| ConnectError::new(Code::InvalidArgument, error))?;
    let mut state = guest.state();
    state.hostname = request.hostname;
    state.env.extend(request.env);
    json(&ResumeResponse {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        applied_us: 1,
        reseeded: Vec::new(),
    })
}

/// Reads a message.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ConnectError> {
    if body.len() > MAX_MESSAGE {
        return Err(ConnectError::new(
            Code::ResourceExhausted,
            "message too long",
        ));
    }
    serde_json::from_slice(body)
        .map_err(|error| ConnectError::new(Code::InvalidArgument, error.to_string()))
}

/// A message as answer.
pub(super) fn json<T: Serialize>(message: &T) -> Answer {
    let bytes = serde_json::to_vec(message)
        .map_err(|error| ConnectError::new(Code::Internal, error.to_string()))?;
    Ok(respond(200, UNARY_CONTENT_TYPE, full(bytes)))
}

fn refused(error: &ConnectError) -> Response<Body> {
    let status = Code::from_name(&error.code).status();
    let bytes = serde_json::to_vec(error).unwrap_or_default();
    respond(status, UNARY_CONTENT_TYPE, full(bytes))
}

pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

pub(super) fn respond(status: u16, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    let content_type = http::HeaderValue::from_static(content_type);
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, content_type);
    response
}
