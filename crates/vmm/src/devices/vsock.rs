//! Stream sockets between guest and host, entirely in this process.
//!
//! ```text
//!   host program ── connect, "CONNECT 49983\n" ──► listener ─► Connection ─► queues ─► guest
//!                ◄── "OK 1073741824\n" ───────────            (credit both ways)
//! ```
//!
//! The host reaches a guest port by connecting to the unix socket the device listens on and writing
//! one line, `CONNECT PORT`, the port in decimal. When the guest accepts, the device answers `OK` and
//! the host's port of the connection; from then on the stream is the guest's. When the guest refuses,
//! the stream ends without an answer. Connections that the guest opens to the host are refused.
//!
//! A copy of a machine shares no stream with the original: it starts with none, and its guest is told
//! that all of its connections are gone (`TRANSPORT_RESET`). Listening sockets in the guest remain. It
//! would end new connections too until it has acted on that, so programs are made to wait until then.

pub mod connection;
pub mod device;
pub mod persist;
pub mod request;

pub use device::{Listener, Vsock};
pub use persist::VsockState;

#[cfg(test)]
mod tests;
