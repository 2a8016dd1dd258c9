//! Requests that may be repeated: with `Idempotency-Key`, a repetition gets the first one's answer.
//!
//! A request with a key is carried through even if its caller goes away, so that the repetition finds a
//! result. Keys belong to a caller, and are remembered for an hour by this daemon.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_wire::api::{IDEMPOTENCY_KEY, REPLAYED};
use forkd_wire::error::ErrorCode;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::sync::watch;

use super::error::Failed;
use super::extract::in_time;
use crate::ApiError;
use crate::auth::Caller;
use crate::state::App;

/// How long an answer is remembered.
const KEPT_FOR: Duration = Duration::from_secs(3600);
/// Answers remembered; the oldest make room.
const KEPT_MAX: usize = 4096;
/// Bytes of answers remembered.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// Longest key, bytes.
const KEY_LEN_MAX: usize = 255;
/// Largest body of a request with a key and of its answer, bytes.
const BODY_MAX: usize = 8 << 20;

/// Routes that make something. Others may be repeated anyway, or stream.
const ROUTES: [&str; 6] = [
    "/v1/sandboxes",
    "/v1/snapshots",
    "/v1/snapshots/{tag}/compact",
    "/v1/sandboxes/{id}/branch",
    "/v1/sandboxes/{id}/exec",
    "/v1/workspaces",
];

/// An answer, to be given again.
#[derive(Debug, Clone)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    failed: Option<Failed>,
}

#[derive(Debug)]
struct Entry {
    /// Of method, path and body: a key must not be used for two different requests.
    request: blake3::Hash,
    answer: watch::Receiver<Option<Answer>>,
}

type Key = (String, String);

/// The answers remembered.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    entries: HashMap<Key, Entry>,
    order: VecDeque<(Instant, Key)>,
    bytes: usize,
}

enum Found {
    /// Nobody has asked so before.
    New(watch::Sender<Option<Answer>>),
    /// The answer is there, or will be.
    Known(watch::Receiver<Option<Answer>>),
    /// The key was used for something else.
    Misused,
}

impl Answers {
    fn look_up(&self, key: Key, request: blake3::Hash) -> Found {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.make_room();
        if let Some(entry) = kept.entries.get(&key) {
            return match entry.request == request {
                true => Found::Known(entry.answer.clone()),
                false => Found::Misused,
            };
        }
        let (tell, answer) = watch::channel(None);
        kept.order.push_back((Instant::now(), key.clone()));
        kept.entries.insert(key, Entry { request, answer });
        Found::New(tell)
    }

    fn grown(&self, bytes: usize) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes += bytes;
        kept.make_room();
    }

    fn forget(&self, key: &Key) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.drop_entry(key);
        kept.order.retain(|(_, other)| other != key);
    }
}

impl Kept {
    fn make_room(&mut self) {
        while let Some((since, _)) = self.order.front() {
            let crowded = self.order.len() > KEPT_MAX || self.bytes > KEPT_BYTES_MAX;
            if !crowded && since.elapsed() < KEPT_FOR {
                return;
            }
            if let Some((_, key)) = self.order.pop_front() {
                self.drop_entry(&key);
            }
        }
    }

    fn drop_entry(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            let len = entry
                .answer
                .borrow()
                .as_ref()
                .map_or(0, |answer| answer.body.len());
            self.bytes = self.bytes.saturating_sub(len);
        }
    }
}

pub(crate) async fn repeatable(State(app): State<App>, request: Request, next: Next) -> Response {
    match key_of(&request) {
        Ok(None) => next.run(request).await,
        Ok(Some(key)) => match keyed(app, key, request, next).await {
            Ok(response) => response,
            Err(error) => error.into_response(),
        },
        Err(error) => error.into_response(),
    }
}

fn key_of(request: &Request) -> Result<Option<Key>, ApiError> {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(MatchedPath::as_str);
    let applies = *request.method() == Method::POST && route.is_some_and(|r| ROUTES.contains(&r));
    let Some(value) = request.headers().get(IDEMPOTENCY_KEY).filter(|_| applies) else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .ok()
        .filter(|text| (1..=KEY_LEN_MAX).contains(&text.len()));
    let text = text.ok_or_else(|| {
        ApiError::invalid(format!(
            "Idempotency-Key must have 1 to {KEY_LEN_MAX} plain characters"
        ))
    })?;
    let caller = request.extensions().get::<Caller>();
    let caller = caller.map_or_else(String::new, |caller| caller.name.clone());
    Ok(Some((caller, text.to_owned())))
}

async fn keyed(app: App, key: Key, request: Request, next: Next) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let too_large = |_| ApiError::new(ErrorCode::PayloadTooLarge, "the body is too large");
    let body = in_time(to_bytes(body, BODY_MAX))
        .await?
        .map_err(too_large)?;
    let tell = match app.answers().look_up(key.clone(), digest(&parts, &body)) {
        Found::Known(answer) => return replay(answer).await,
        Found::Misused => {
            let text = "this Idempotency-Key was used for a different request";
            return Err(ApiError::new(ErrorCode::AlreadyExists, text)
                .remedy("use a new key for every request that is not a repetition"));
        }
        Found::New(tell) => tell,
    };
    let work = tokio::spawn(async move {
        let response = next.run(Request::from_parts(parts, Body::from(body))).await;
        let answer = collect(response).await;
        // What failed on our side may be tried again with the same key.
        match &answer {
            Ok(answer) if !answer.status.is_server_error() => {
                app.answers().grown(answer.body.len());
                tell.send_replace(Some(answer.clone()));
            }
            _ => app.answers().forget(&key),
        }
        answer
    });
    let broke = |failure| {
        ApiError::new(
            ErrorCode::Internal,
            format!("the request broke off: {failure}"),
        )
    };
    Ok(work.await.map_err(broke)??.into_response(false))
}

fn digest(parts: &Parts, body: &Bytes) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(parts.method.as_str().as_bytes())
        .update(b"\0");
    hasher
        .update(parts.uri.to_string().as_bytes())
        .update(b"\0");
    hasher.update(body);
    hasher.finalize()
}

async fn replay(mut answer: watch::Receiver<Option<Answer>>) -> Result<Response, ApiError> {
    // The sender goes without an answer when the first request failed or broke off.
    let told = answer
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|answer| answer.clone());
    let answer = told.ok_or_else(|| {
        ApiError::new(
            ErrorCode::Busy,
            "the first request with this Idempotency-Key failed",
        )
        .remedy("try again")
    })?;
    Ok(answer.into_response(true))
}

async fn collect(response: Response) -> Result<Answer, ApiError> {
    let (parts, body) = response.into_parts();
    let failed = parts.extensions.get::<Failed>().copied();
    let streams = parts.headers.get(header::CONTENT_TYPE);
    if streams.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
        return Err(ApiError::invalid(
            "a streamed request cannot have an Idempotency-Key",
        ));
    }
    let body = to_bytes(body, usize::MAX).await.map_err(|error| {
        ApiError::new(
            ErrorCode::Internal,
            format!("the answer broke off: {error}"),
        )
    })?;
    Ok(Answer {
        status: parts.status,
        headers: parts.headers,
        body,
        failed,
    })
}

impl Answer {
    fn into_response(self, again: bool) -> Response {
        let mut response = (self.status, self.headers, self.body).into_response();
        if let Some(failed) = self.failed {
            response.extensions_mut().insert(failed);
        }
        if again {
            response
                .headers_mut()
                .insert(REPLAYED, HeaderValue::from_static("true"));
        }
        response
    }
}
