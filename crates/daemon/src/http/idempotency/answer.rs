//! An answer as it is kept: its head as one line of JSON, then its body.

use axum::body::to_bytes;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_wire::api::REPLAYED;
use forkd_wire::error::ErrorCode;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};

use crate::ApiError;
use crate::http::error::Failed;

/// An answer, to be given again.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    failed: Option<Failed>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    status: u16,
    headers: Vec<(String, String)>,
    code: Option<ErrorCode>,
}

impl Answer {
    pub(super) async fn collect(response: Response) -> Result<Answer, ApiError> {
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await;
        Ok(Answer {
            status: parts.status,
            headers: parts.headers,
            body: body.map_err(|error| internal("the answer broke off", &error))?,
            failed: parts.extensions.get::<Failed>().copied(),
        })
    }

    /// The bytes to keep.
    pub(super) fn write(&self) -> Result<Vec<u8>, ApiError> {
        let text = |value: &HeaderValue| value.to_str().map(str::to_owned).ok();
        let headers = self.headers.iter();
        let head = Head {
            status: self.status.as_u16(),
            headers: headers
                .filter_map(|(name, value)| Some((name.to_string(), text(value)?)))
                .collect(),
            code: self.failed.map(|Failed(code)| code),
        };
        let head = serde_json::to_vec(&head);
        let head = head.map_err(|error| internal("the answer cannot be kept", &error))?;
        Ok([&head, &b"\n"[..], &self.body].concat())
    }

    /// The answer that was kept.
    pub(super) fn read(kept: &[u8]) -> Result<Answer, ApiError> {
        let damaged = || ApiError::new(ErrorCode::Corrupt, "the answer that was kept is damaged");
        let end = kept
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or_else(damaged)?;
        let head: Head = serde_json::from_slice(&kept[..end]).map_err(|_| damaged())?;
        let header = |(name, value): (String, String)| {
            Some((
                name.parse::<HeaderName>().ok()?,
                value.parse::<HeaderValue>().ok()?,
            ))
        };
        let headers: Option<HeaderMap> = head.headers.into_iter().map(header).collect();
        Ok(Answer {
            status: StatusCode::from_u16(head.status).map_err(|_| damaged())?,
            headers: headers.ok_or_else(damaged)?,
            body: Bytes::copy_from_slice(&kept[end + 1..]),
            failed: head.code.map(Failed),
        })
    }

    pub(super) fn into_response(self, again: bool) -> Response {
        let mut response = (self.status, self.headers, self.body).into_response();
        if let Some(failed) = self.failed {
            response.extensions_mut().insert(failed);
        }
        if again {
            let headers = response.headers_mut();
            headers.insert(REPLAYED, HeaderValue::from_static("true"));
        }
        response
    }
}

fn internal(what: &str, error: &dyn std::error::Error) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_kept_is_answered_as_at_first() {
        for response in [
            (StatusCode::CREATED, [("forkd-ready-ms", "1.5")], "a\nb").into_response(),
            ApiError::invalid("no").into_response(),
        ] {
            let first = Answer::collect(response).await.unwrap();
            let kept = Answer::read(&first.write().unwrap()).unwrap();
            assert_eq!(kept.status, first.status);
            assert_eq!(kept.headers, first.headers);
            assert_eq!(kept.body, first.body);
            let code = |answer: &Answer| answer.failed.map(|Failed(code)| code);
            assert_eq!(code(&kept), code(&first));
        }
        for damaged in [&b""[..], b"{}\n", b"{\"status\":7,\"headers\":[]}\n"] {
            assert_eq!(
                Answer::read(damaged).unwrap_err().code(),
                ErrorCode::Corrupt
            );
        }
    }
}
