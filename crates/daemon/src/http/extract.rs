//! Extractors whose refusals have the shape of every other error.

use std::future::Future;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::response::IntoResponse;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ApiError;

/// Longest time a body may take to arrive: a slow client must not hold a request open for ever.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A JSON body, in or out.
#[derive(Debug)]
pub(crate) struct Json<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let axum::Json(body) = in_time(axum::Json::from_request(request, state)).await??;
        Ok(Self(body))
    }
}

pub(crate) async fn in_time<F: Future>(body: F) -> Result<F::Output, ApiError> {
    let arrived = tokio::time::timeout(BODY_TIMEOUT, body).await;
    arrived.map_err(|_| {
        let secs = BODY_TIMEOUT.as_secs();
        ApiError::invalid(format!("the body did not arrive within {secs} s"))
    })
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> axum::response::Response {
        axum::Json(self.0).into_response()
    }
}

/// The variable parts of the path.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(ApiError))]
pub(crate) struct Path<T>(pub(crate) T);

/// The query.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(ApiError))]
pub(crate) struct Query<T>(pub(crate) T);

/// A JSON body that may be left out, with or without its content type.
#[derive(Debug)]
pub(crate) struct OptionalJson<T>(pub(crate) T);

impl<S, T> FromRequest<S> for OptionalJson<T>
where
    S: Send + Sync,
    T: DeserializeOwned + Default,
{
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let declared = request.headers().contains_key(http::header::CONTENT_TYPE);
        if declared {
            let Json(body) = Json::from_request(request, state).await?;
            return Ok(Self(body));
        }
        let bytes = in_time(bytes::Bytes::from_request(request, state)).await?;
        let bytes = bytes.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        match serde_json::from_slice(&bytes) {
            Ok(body) => Ok(Self(body)),
            Err(error) => Err(ApiError::invalid(format!("the body does not fit: {error}"))),
        }
    }
}
