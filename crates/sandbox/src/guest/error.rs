//! What can go wrong with a call to a guest.

use std::time::Duration;

use forkd_engine::Error as EngineError;
use forkd_wire::agent::connect::Code;
use forkd_wire::error::ErrorCode;

/// A call to a guest failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection to the guest could be opened.
    #[error("the guest cannot be reached")]
    Dial(#[source] EngineError),
    /// The connection ended during the call.
    #[error("the connection to the guest was lost during {what}")]
    Lost {
        /// The call.
        what: &'static str,
        /// Why, if the transport said.
        #[source]
        source: Option<hyper::Error>,
    },
    /// The guest did not answer in time.
    #[error("the guest did not finish {what} within {millis} ms")]
    Timeout {
        /// The call.
        what: &'static str,
        /// The limit.
        millis: u128,
    },
    /// The agent answered that it cannot.
    #[error("{message}")]
    Refused {
        /// The kind of refusal.
        code: Code,
        /// The agent's words, bounded; not to be trusted more than the guest.
        message: String,
    },
    /// The agent answered something that cannot be understood.
    #[error("the guest's agent gave an answer to {what} that makes no sense: {detail}")]
    Protocol {
        /// The call.
        what: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// What the caller gave cannot be sent.
    #[error("{what} cannot be asked of the guest: {detail}")]
    Request {
        /// The call.
        what: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

impl Error {
    pub(super) fn timeout(what: &'static str, limit: Duration) -> Self {
        Self::Timeout {
            what,
            millis: limit.as_millis(),
        }
    }

    pub(super) fn protocol(what: &'static str, detail: impl Into<String>) -> Self {
        Self::Protocol {
            what,
            detail: detail.into(),
        }
    }

    /// Whether the same call may succeed a little later, because the guest is coming up.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Dial(EngineError::Exited { .. } | EngineError::Unsupported { .. }) => false,
            Self::Dial(_) | Self::Lost { .. } => true,
            _ => false,
        }
    }

    /// Whether eval is refused because the guest has no interpreter.
    pub fn is_missing_interpreter(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: Code::FailedPrecondition,
                ..
            }
        )
    }

    /// The code a client of the daemon is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Dial(_) | Self::Lost { .. } | Self::Protocol { .. } => {
                ErrorCode::GuestUnreachable
            }
            Self::Timeout { .. } => ErrorCode::Timeout,
            Self::Request { .. } => ErrorCode::InvalidArgument,
            Self::Refused { code, .. } => match code {
                Code::NotFound => ErrorCode::NotFound,
                Code::AlreadyExists => ErrorCode::AlreadyExists,
                Code::InvalidArgument
                | Code::OutOfRange
                | Code::Unauthenticated
                | Code::PermissionDenied => ErrorCode::InvalidArgument,
                Code::DeadlineExceeded => ErrorCode::Timeout,
                Code::ResourceExhausted => ErrorCode::InsufficientResources,
                Code::Unimplemented => ErrorCode::Unsupported,
                Code::FailedPrecondition | Code::Unavailable | Code::Aborted => ErrorCode::NotReady,
                Code::Canceled | Code::Unknown | Code::Internal | Code::DataLoss => {
                    ErrorCode::Internal
                }
            },
        }
    }
}
