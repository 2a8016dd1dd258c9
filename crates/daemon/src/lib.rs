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

mod args;
pub mod audit;
pub mod auth;
pub mod config;
mod convert;
mod engine;
mod guest;
mod http;
mod images;
mod metrics;
pub mod openapi;
mod paths;
mod routes;
mod run;
mod serve;
mod state;
pub mod tls;
mod workspaces;

pub use args::{EngineArgs, EngineName, IsolationArgs, Jail, Net, OnExit, ServeArgs};
pub use config::Config;
pub use engine::select as select_engine;
pub use http::error::ApiError;
pub use http::router::router;
pub use paths::{NodePaths, PathArgs};
pub use run::{log_in_colours, run_serve};
pub use serve::{Error, open_node, serve, serve_with};
pub use state::Options;

/// Every place at which a test kills the daemon, see [`forkd_sandbox::crash`].
pub fn crash_places() -> Vec<String> {
    let own = [
        &workspaces::CRASH_PLACES[..],
        &http::idempotency::CRASH_PLACES,
    ]
    .concat();
    let own = own.into_iter().map(str::to_owned);
    forkd_sandbox::crash::all().into_iter().chain(own).collect()
}
