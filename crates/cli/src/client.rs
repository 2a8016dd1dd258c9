//! One client, two transports: HTTP to a daemon, or the daemon's own router within this process.
//!
//! Commands see typed calls ([`api`]) and never know which transport carries them. What a daemon says
//! about a failure is passed on as it is: sentence, code and remedy.

use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use forkd_wire::api::error::ErrorBody;
use forkd_wire::error::ErrorCode;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tower::ServiceExt;

use crate::failure::Failure;

pub mod api;
mod events;
mod socket;
mod web;

pub use socket::{Message, Receiver, Sender, Socket};
use web::Web;

/// Most bytes of an answer that is read as a whole. A thousand sandboxes are well below 1 MiB.
const ANSWER_MAX: usize = 64 << 20;

/// How long a daemon that is there may take to say so.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Talks to a node.
#[derive(Debug, Clone)]
pub struct Client {
    transport: Transport,
    token: Option<HeaderValue>,
}

#[derive(Debug, Clone)]
enum Transport {
    Web(Box<Web>),
    Embedded(Router),
}

impl Client {
    /// A client of the daemon at `url`.
    pub fn web(url: &str, token: Option<&str>) -> Result<Self, Failure> {
        let token = token
            .filter(|token| !token.trim().is_empty())
            .map(bearer)
            .transpose()?;
        Ok(Self {
            transport: Transport::Web(Box::new(Web::new(url)?)),
            token,
        })
    }

    /// A client of a router in this process.
    pub fn embedded(router: Router) -> Self {
        Self {
            transport: Transport::Embedded(router),
            token: None,
        }
    }

    /// Whether the daemon runs in this process.
    pub fn is_embedded(&self) -> bool {
        matches!(self.transport, Transport::Embedded(_))
    }

    /// Whether the node's processes are those of this host.
    pub fn is_local(&self) -> bool {
        match &self.transport {
            Transport::Web(web) => web.is_local(),
            Transport::Embedded(_) => true,
        }
    }

    /// Whether a forkd daemon answers.
    pub async fn answers(&self) -> bool {
        let probe = self.request(Method::GET, "/healthz", Body::empty(), None);
        let answer = tokio::time::timeout(PROBE_TIMEOUT, probe).await;
        matches!(answer, Ok(Ok(response)) if response.status() == StatusCode::OK)
    }

    /// Sends a request and reads a JSON answer.
    pub async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
    ) -> Result<T, Failure> {
        decode(self.stream(method, path, Body::empty(), None).await?).await
    }

    /// Sends a JSON body and reads a JSON answer.
    pub async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<T, Failure> {
        decode(self.send_json(method, path, body).await?).await
    }

    /// Sends a JSON body and gives the answer's head; its body is still to be read.
    pub async fn send_json<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<Response<Body>, Failure> {
        let bytes = serde_json::to_vec(body)
            .map_err(|error| Failure::caused("cannot write the request as JSON", &error))?;
        self.stream(method, path, Body::from(bytes), Some("application/json"))
            .await
    }

    /// Sends a request whose answer has no body worth reading.
    pub async fn done(&self, method: Method, path: &str) -> Result<(), Failure> {
        let response = self.stream(method, path, Body::empty(), None).await?;
        // Read to the end, so that the connection can be used again.
        collect(response.into_body()).await.map(drop)
    }

    /// Sends any body; the answer's body is a stream. A refusal is a failure.
    pub async fn stream(
        &self,
        method: Method,
        path: &str,
        body: Body,
        content_type: Option<&'static str>,
    ) -> Result<Response<Body>, Failure> {
        let response = self.request(method, path, body, content_type).await?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(refusal(response).await)
        }
    }

    /// Opens a WebSocket.
    pub async fn socket(&self, path: &str) -> Result<Socket, Failure> {
        match &self.transport {
            Transport::Web(web) => socket::open(web, self.token.as_ref(), path).await,
            Transport::Embedded(_) => Err(Failure::new("this command needs a daemon")),
        }
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Body,
        content_type: Option<&'static str>,
    ) -> Result<Response<Body>, Failure> {
        let uri = match &self.transport {
            Transport::Web(web) => web.uri(path)?,
            Transport::Embedded(_) => path
                .parse()
                .map_err(|error| Failure::caused(format!("`{path}` is no path"), &error))?,
        };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        if let Some(kind) = content_type {
            request
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        if let Some(token) = &self.token {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        match &self.transport {
            Transport::Web(web) => web.send(request).await,
            Transport::Embedded(router) => match router.clone().oneshot(request).await {
                Ok(response) => Ok(response),
                Err(never) => match never {},
            },
        }
    }
}

fn bearer(token: &str) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| {
        Failure::new("the daemon's token holds characters that no header may hold")
            .with_help("give the token in FORKD_TOKEN exactly as it stands in the daemon's file")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

async fn collect(body: Body) -> Result<Bytes, Failure> {
    let limited = Limited::new(body, ANSWER_MAX);
    match limited.collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(Failure::caused("the daemon's answer broke off", &*error)),
    }
}

async fn decode<T: DeserializeOwned>(response: Response<Body>) -> Result<T, Failure> {
    let bytes = collect(response.into_body()).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::caused(
            "the daemon's answer is not what this forkd understands",
            &error,
        )
        .with_help(
            "use the same version of forkd and of the daemon; `forkd ping` and /version tell",
        )
    })
}

/// Turns an answer of 400 and above into what it says.
async fn refusal(response: Response<Body>) -> Failure {
    let status = response.status();
    let retry_after = response.headers().get(RETRY_AFTER);
    // Of the two forms it has, a proxy may send the other, a date.
    let retry_after: Option<u32> = retry_after.and_then(|secs| secs.to_str().ok()?.parse().ok());
    let bytes = collect(response.into_body()).await.unwrap_or_default();
    if let Ok(body) = serde_json::from_slice::<ErrorBody>(&bytes) {
        let failure = from_body(body);
        return match (retry_after, failure.help().map(str::to_owned)) {
            (None, _) => failure,
            (Some(secs), None) => failure.with_help(format!("try again in {secs} s")),
            (Some(secs), Some(help)) => {
                failure.with_help(format!("{help}; the same may work in {secs} s"))
            }
        };
    }
    let text = String::from_utf8_lossy(&bytes);
    let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    Failure::new(format!("the daemon answered {status}: {text}"))
        .with_help("is this really a forkd daemon? see --daemon-url")
}

/// A failure as the daemon tells it.
pub fn from_body(body: ErrorBody) -> Failure {
    let failure = Failure::new(body.error).with_code(body.code);
    match (body.remedy, body.code) {
        (Some(remedy), _) => failure.with_help(remedy),
        (None, ErrorCode::Unauthorized) => {
            failure.with_help("give the daemon's token in FORKD_TOKEN or with --daemon-token")
        }
        (None, ErrorCode::Forbidden) => failure.with_help("use a token with a wider scope"),
        (None, _) => failure,
    }
}

#[cfg(test)]
mod tests;
