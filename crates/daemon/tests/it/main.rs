//! The whole daemon: real router, real heart, real agents, no VM.
#![allow(
    clippy::unwrap_used,
    reason = "a test that meets the unexpected fails here"
)]
#![allow(clippy::print_stdout, reason = "tests say what they skipped")]

mod admission;
mod auth;
#[path = "../../benches/api/client.rs"]
mod client;
mod conformance;
mod daemon;
mod engine;
mod errors;
mod figures;
mod guests;
mod killed;
mod observed;
mod packaging;
mod program;
mod sandboxes;
mod snapshots;
mod trouble;
mod websocket;
mod workspaces;
mod world;
