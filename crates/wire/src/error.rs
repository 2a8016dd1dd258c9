//! The closed list of error codes, part of the contract with every client.
//!
//! A code is minted only when a client would act differently on it. The text of an error is for people and
//! may change; the code may not.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $status:literal;)*) => {
        /// What kind of failure an error is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[non_exhaustive]
        pub enum ErrorCode {
            $($(#[$doc])* $variant,)*
        }

        impl ErrorCode {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$variant,)*];

            /// The code as it appears on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $text,)* }
            }

            /// The HTTP status it is answered with.
            pub fn status(self) -> u16 {
                match self { $(ErrorCode::$variant => $status,)* }
            }
        }
    };
}

codes! {
    /// The request is malformed or a value is out of range.
    InvalidArgument = "invalid_argument", 400;
    /// No valid token.
    Unauthorized = "unauthorized", 401;
    /// The token does not allow this.
    Forbidden = "forbidden", 403;
    /// No such route, snapshot, sandbox, process or file.
    NotFound = "not_found", 404;
    /// The route does not know the method.
    MethodNotAllowed = "method_not_allowed", 405;
    /// The name is taken.
    AlreadyExists = "already_exists", 409;
    /// Something depends on it, or is doing something with it right now.
    InUse = "in_use", 409;
    /// The snapshot or sandbox is not in a state that allows this.
    NotReady = "not_ready", 409;
    /// The snapshot does not fit this host.
    Incompatible = "incompatible", 409;
    /// The body is too large.
    PayloadTooLarge = "payload_too_large", 413;
    /// The body's content type is not understood.
    UnsupportedMediaType = "unsupported_media_type", 415;
    /// Too many operations at once; try again.
    Busy = "busy", 429;
    /// A bug of ours, or a host that broke under us.
    Internal = "internal", 500;
    /// A file of a snapshot or of the state is damaged.
    Corrupt = "corrupt", 500;
    /// The engine cannot do this.
    Unsupported = "unsupported", 501;
    /// The guest's agent does not answer, or the sandbox died.
    GuestUnreachable = "guest_unreachable", 502;
    /// The engine's program is missing, too old or refuses to start.
    EngineUnavailable = "engine_unavailable", 503;
    /// The daemon is shutting down.
    ShuttingDown = "shutting_down", 503;
    /// It took longer than was allowed.
    Timeout = "timeout", 504;
    /// The host has too little memory, disk or other resource.
    InsufficientResources = "insufficient_resources", 507;
}

impl ErrorCode {
    /// After how many seconds the same request may fare better without anybody having changed anything; `None` where it
    /// will not. What an answer says in its `Retry-After`.
    pub fn retry_after_secs(self) -> Option<u32> {
        match self {
            // What is under way ends.
            Self::Busy => Some(1),
            // Another daemon takes over.
            Self::ShuttingDown => Some(5),
            // Sandboxes end, and what they held is free.
            Self::InsufficientResources => Some(10),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_text_is_what_serde_writes() {
        for code in ErrorCode::ALL {
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{}\"", code.as_str()));
        }
    }

    #[test]
    fn the_table_is_pinned() {
        let table: Vec<String> = ErrorCode::ALL
            .iter()
            .map(|c| format!("{} {}", c.status(), c.as_str()))
            .collect();
        assert_eq!(
            table.join("\n"),
            "400 invalid_argument\n401 unauthorized\n403 forbidden\n404 not_found\n\
             405 method_not_allowed\n409 already_exists\n409 in_use\n409 not_ready\n\
             409 incompatible\n413 payload_too_large\n415 unsupported_media_type\n429 busy\n\
             500 internal\n500 corrupt\n501 unsupported\n502 guest_unreachable\n\
             503 engine_unavailable\n503 shutting_down\n504 timeout\n507 insufficient_resources"
        );
    }
}
