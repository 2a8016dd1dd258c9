//! The whole daemon: real router, real heart, real agents, no VM.

mod auth;
mod engine;
mod errors;
mod guests;
mod observed;
mod program;
mod sandboxes;
mod snapshots;
mod websocket;
mod workspaces;
mod world;
