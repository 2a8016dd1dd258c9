//! The one place where failures become answers.

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::response::{IntoResponse, Response};
use forkd_sandbox::spec::InvalidSpec;
use forkd_wire::api::error::ErrorBody;
use forkd_wire::error::ErrorCode;
use http::StatusCode;
use http::header::RETRY_AFTER;

/// An answer that says what went wrong.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

/// Marks an answer with its code, for the metrics.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Failed(pub(crate) ErrorCode);

impl ApiError {
    /// An error of a kind, with a sentence.
    pub fn new(code: ErrorCode, error: impl Into<String>) -> Self {
        let status = StatusCode::from_u16(code.status());
        Self {
            status: status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            body: ErrorBody {
                error: error.into(),
                code,
                remedy: None,
            },
        }
    }

    /// A request that is malformed or out of range.
    pub fn invalid(error: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, error)
    }

    /// What would help.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.body.remedy = Some(remedy.into());
        self
    }

    /// Answers with another status than the code's own, where older clients expect it.
    #[must_use]
    pub(crate) fn status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// The kind of failure.
    pub fn code(&self) -> ErrorCode {
        self.body.code
    }

    /// What goes on the wire.
    pub fn into_body(self) -> ErrorBody {
        self.body
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::warn!(
                code = self.body.code.as_str(),
                error = self.body.error,
                "request failed"
            );
        }
        let code = self.body.code;
        let mut response = (self.status, axum::Json(self.body)).into_response();
        if let Some(secs) = code.retry_after_secs() {
            response.headers_mut().insert(RETRY_AFTER, secs.into());
        }
        response.extensions_mut().insert(Failed(code));
        response
    }
}

impl From<forkd_sandbox::Error> for ApiError {
    fn from(error: forkd_sandbox::Error) -> Self {
        let mut answer = Self::new(error.code(), error.chain());
        answer.body.remedy = error.remedy().map(str::to_owned);
        answer
    }
}

impl From<InvalidSpec> for ApiError {
    fn from(error: InvalidSpec) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        match rejection {
            JsonRejection::MissingJsonContentType(_) => Self::new(
                ErrorCode::UnsupportedMediaType,
                "the body is not declared as JSON",
            )
            .remedy("send the header Content-Type: application/json"),
            other if other.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                Self::new(ErrorCode::PayloadTooLarge, "the body is too large")
            }
            other => Self::invalid(format!("the body does not fit: {}", chain(&other))),
        }
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::invalid(format!("the path does not fit: {}", chain(&rejection)))
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::invalid(format!("the query does not fit: {}", chain(&rejection)))
    }
}

/// An error's text followed by those of its causes, each once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let line = source.to_string();
        if !text.contains(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        cause = source.source();
    }
    text
}
