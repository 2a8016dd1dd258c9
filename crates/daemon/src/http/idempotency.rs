//! Requests that may be repeated: with `Idempotency-Key`, a repetition gets the first one's answer.
//!
//! A request with a key is carried through even if its caller goes away, so that the repetition finds a
//! result. Keys belong to a caller. What was answered is in the node's record, and so outlives the daemon; what is
//! under way is here too, so that a repetition can wait for it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use axum::body::{Body, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_sandbox::crash;
use forkd_sandbox::record::{Begun, Repeatable, RequestId};
use forkd_wire::api::IDEMPOTENCY_KEY;
use forkd_wire::error::ErrorCode;
use http::request::Parts;
use http::{Method, header};
use tokio::sync::watch;

use super::extract::in_time;
use crate::ApiError;
use crate::auth::Caller;
use crate::state::App;

mod answer;

use answer::Answer;

/// Longest key, bytes.
const KEY_LEN_MAX: usize = 255;
/// Largest body of a request with a key, bytes.
const BODY_MAX: usize = 8 << 20;

/// The route whose requests start over when the daemon ended before they were answered: what it made is undone.
const STARTS_OVER: &str = "/v1/sandboxes";

/// Routes that make something. Others may be repeated anyway, or stream.
const ROUTES: [&str; 6] = [
    "/v1/sandboxes",
    "/v1/snapshots",
    "/v1/snapshots/{tag}/compact",
    "/v1/sandboxes/{id}/branch",
    "/v1/sandboxes/{id}/exec",
    "/v1/workspaces",
];

/// Places at which a test kills the daemon; see [`forkd_sandbox::crash`].
pub(crate) const CRASH_PLACES: [&str; 2] = ["request: begun", "request: answered"];

/// What a request came to, told to those that wait for it.
type Told = Option<Result<Answer, ApiError>>;

/// The requests that are being carried out.
#[derive(Debug, Default)]
pub(crate) struct UnderWay {
    requests: Mutex<HashMap<RequestId, Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    content: String,
    told: watch::Receiver<Told>,
}

enum Entered {
    /// Nobody is at it.
    First(watch::Sender<Told>),
    /// Somebody is, and will tell.
    Repetition(watch::Receiver<Told>),
    /// The key is in use for something else.
    Different,
}

impl UnderWay {
    fn enter(&self, request: &Repeatable) -> Entered {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = requests.get(&request.id) {
            return match first.content == request.content {
                true => Entered::Repetition(first.told.clone()),
                false => Entered::Different,
            };
        }
        let (tell, told) = watch::channel(None);
        let content = request.content.clone();
        requests.insert(request.id.clone(), Waiting { content, told });
        Entered::First(tell)
    }

    fn leave(&self, id: &RequestId) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.remove(id);
    }
}

/// Leaves when the request is done with, however it ends.
struct Stay {
    app: App,
    id: RequestId,
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.app.under_way().leave(&self.id);
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

/// A request's name, and the route it came by.
struct Key {
    id: RequestId,
    route: String,
}

fn key_of(request: &Request) -> Result<Option<Key>, ApiError> {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(MatchedPath::as_str)
        .filter(|route| *request.method() == Method::POST && ROUTES.contains(route));
    let value = request.headers().get(IDEMPOTENCY_KEY);
    let (Some(route), Some(value)) = (route, value) else {
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
    let caller = caller.map_or("", |caller| &caller.name);
    Ok(Some(Key {
        id: RequestId(digest([caller.as_bytes(), text.as_bytes()])),
        route: route.to_owned(),
    }))
}

async fn keyed(app: App, key: Key, request: Request, next: Next) -> Result<Response, ApiError> {
    let (mut parts, body) = request.into_parts();
    let too_large = |_| ApiError::new(ErrorCode::PayloadTooLarge, "the body is too large");
    let body = in_time(to_bytes(body, BODY_MAX))
        .await?
        .map_err(too_large)?;
    let request = Repeatable {
        content: content(&parts, &body),
        starts_over: key.route == STARTS_OVER,
        id: key.id,
    };
    let tell = match app.under_way().enter(&request) {
        Entered::Repetition(told) => return wait_for(told).await,
        Entered::Different => return Err(different()),
        Entered::First(tell) => tell,
    };
    let stay = Stay {
        app,
        id: request.id.clone(),
    };
    parts.extensions.insert(request.id.clone());
    let work = tokio::spawn(async move {
        let call = next.run(Request::from_parts(parts, Body::from(body)));
        let outcome = carried_out(&stay.app, request, call).await;
        let told = outcome.as_ref().map(|(answer, _)| answer.clone());
        tell.send_replace(Some(told.map_err(ApiError::clone)));
        outcome
    });
    let broke = |failure| {
        ApiError::new(
            ErrorCode::Internal,
            format!("the request broke off: {failure}"),
        )
    };
    let (answer, again) = work.await.map_err(broke)??;
    Ok(answer.into_response(again))
}

/// The answer, and whether it was given before.
async fn carried_out(
    app: &App,
    request: Repeatable,
    call: impl Future<Output = Response>,
) -> Result<(Answer, bool), ApiError> {
    let id = request.id.clone();
    match app.node().begin_request(request).await? {
        Begun::New => {}
        Begun::Answered(kept) => return Ok((Answer::read(&kept)?, true)),
        Begun::CutOff => return Err(cut_off()),
        Begun::Different => return Err(different()),
    }
    crash::point("request: begun");
    let answer = collect(call.await).await;
    match &answer {
        Ok(answer) if !answer.status.is_server_error() => {
            app.node().answer_request(id, answer.write()?).await?;
            crash::point("request: answered");
        }
        // What failed on our side may be tried again with the same key.
        _ => app.node().forget_request(id).await?,
    }
    Ok((answer?, false))
}

fn different() -> ApiError {
    let text = "this Idempotency-Key was used for a different request";
    ApiError::new(ErrorCode::AlreadyExists, text)
        .remedy("use a new key for every request that is not a repetition")
}

fn cut_off() -> ApiError {
    let text =
        "the first request with this Idempotency-Key was cut off, and how far it came is not known";
    ApiError::new(ErrorCode::AlreadyExists, text)
        .remedy("see whether it was done; to have it done again, use a new key")
}

fn content(parts: &Parts, body: &Bytes) -> String {
    let uri = parts.uri.to_string();
    digest([parts.method.as_str().as_bytes(), uri.as_bytes(), body])
}

/// Of the parts and where each ends.
fn digest<const N: usize>(parts: [&[u8]; N]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&part.len().to_le_bytes()).update(part);
    }
    hasher.finalize().to_string()
}

async fn wait_for(mut told: watch::Receiver<Told>) -> Result<Response, ApiError> {
    // The sender goes without a word when the first request broke off.
    let told = told.wait_for(Option::is_some).await.ok();
    let answer = told.and_then(|told| told.clone()).and_then(Result::ok);
    let answer = answer.filter(|answer| !answer.status.is_server_error());
    let answer = answer.ok_or_else(|| {
        ApiError::new(
            ErrorCode::Busy,
            "the first request with this Idempotency-Key failed",
        )
        .remedy("try again")
    })?;
    Ok(answer.into_response(true))
}

async fn collect(response: Response) -> Result<Answer, ApiError> {
    let streams = response.headers().get(header::CONTENT_TYPE);
    if streams.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
        return Err(ApiError::invalid(
            "a streamed request cannot have an Idempotency-Key",
        ));
    }
    Answer::collect(response).await
}
