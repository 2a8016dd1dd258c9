//! What all routes share: errors, extractors, the router itself.

pub(crate) mod error;
pub(crate) mod extract;
pub(crate) mod idempotency;
pub(crate) mod observe;
pub(crate) mod router;
