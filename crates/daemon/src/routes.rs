//! The routes, one file per resource. Each parses, calls and converts; none decides.

pub(crate) mod exec;
pub(crate) mod exec_ws;
pub(crate) mod failures;
pub(crate) mod files;
pub(crate) mod node;
pub(crate) mod sandboxes;
pub(crate) mod snapshots;
pub(crate) mod workspaces;

use std::time::Duration;

use axum::response::sse::Event;
use serde::Serialize;

use crate::ApiError;

/// A server-sent event with JSON data.
fn event(name: &str, data: &impl Serialize) -> Event {
    let event = Event::default().event(name);
    // Our own types have string keys and no failing fields, so this cannot fail.
    event.json_data(data).unwrap_or_default()
}

/// A number of seconds from a request, at least 1.
fn seconds(name: &str, secs: u64, max: u64) -> Result<Duration, ApiError> {
    if (1..=max).contains(&secs) {
        return Ok(Duration::from_secs(secs));
    }
    Err(ApiError::invalid(format!(
        "{name} is {secs}, must be within 1..={max}"
    )))
}
