//! The host side of the agent protocol.

/// Calls a guest agent.
#[derive(Debug, Clone)]
pub struct Client {}
