//! Everything that crosses a process boundary: REST types, error codes, the guest agent's protocol,
//! the machine monitor's control messages, and the formats of files that two programs share.
//!
//! No I/O, no async, no unsafe: the agent compiles this crate too.
#![forbid(unsafe_code)]

pub mod agent;
pub mod api;
pub mod error;
pub mod id;
pub mod layer;
pub mod link;
pub mod vmm;
