//! The daemon's REST interface, `/v1`: every request and response body.
//!
//! Fields that the original `/v1` has keep their names, types and defaults; additions stand beside them. A
//! field is never renamed or removed, and unknown fields of a request are ignored, so that older and newer
//! clients go on working. Times are seconds since the Unix epoch where the name ends in `_unix`,
//! milliseconds where it ends in `_ms`.

pub mod error;
pub mod exec;
pub mod files;
pub mod node;
pub mod sandbox;
pub mod snapshot;
pub mod workspace;

/// Header of a request that asks for the answer of an earlier request with the same key, if there was one.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Header of an answer that is a repetition, see [`IDEMPOTENCY_KEY`].
pub const REPLAYED: &str = "forkd-replayed";
/// Header of every answer: names the request in the audit log and the daemon's own log.
pub const REQUEST_ID: &str = "x-request-id";
/// Header of a page of a list: the value to pass as `after` for the next page. Absent on the last.
pub const NEXT_PAGE: &str = "forkd-next";
/// Header of `POST /v1/sandboxes`: milliseconds until the template could be forked.
pub const TEMPLATE_MS: &str = "forkd-template-ms";
/// Header of `POST /v1/sandboxes`: milliseconds until the last VM ran.
pub const FORKED_MS: &str = "forkd-forked-ms";
/// Header of `POST /v1/sandboxes`: milliseconds until the last agent had answered.
pub const READY_MS: &str = "forkd-ready-ms";

fn is_false(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests;
