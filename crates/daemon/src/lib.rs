//! forkd-controller: the node's daemon. Its HTTP interface, who may use it, what is written down about
//! it, and how the parts are put together.
//!
//! Routes parse, call and convert; whatever is decided, the heart decides (`forkd-sandbox`). The command line
//! drives the same [`router`] without a socket when it runs the daemon within itself.
//!
//! ```text
//!   listener ─► request id ─► audit, metrics ─► token ─► route ─► Node
//!   (tls)                                                  └────► error ─► {"error","code","remedy"}
//! ```
#![forbid(unsafe_code)]

mod convert;
mod http;
mod images;
mod paths;
mod routes;
mod state;

pub use http::error::ApiError;
pub use http::router::router;
pub use paths::{NodePaths, PathArgs};
pub use state::Options;
