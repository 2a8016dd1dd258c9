//! Errors of the layers below, as the heart's answers: which code, which remedy.

use forkd_engine::Error as EngineError;
use forkd_snapshot::Error as StoreError;
use forkd_wire::error::ErrorCode;

use crate::spec::InvalidSpec;
use crate::{Error, guest, record};

impl From<EngineError> for Error {
    fn from(error: EngineError) -> Self {
        let code = match &error {
            EngineError::Program { .. } => ErrorCode::EngineUnavailable,
            EngineError::Timeout { .. } => ErrorCode::Timeout,
            EngineError::Snapshot { .. } => ErrorCode::Corrupt,
            EngineError::Incompatible { .. } => ErrorCode::Incompatible,
            EngineError::Unsupported { .. } => ErrorCode::Unsupported,
            EngineError::Spawn { .. }
            | EngineError::Exited { .. }
            | EngineError::Control { .. }
            | EngineError::File { .. } => ErrorCode::Internal,
        };
        let remedy = match code {
            ErrorCode::Corrupt | ErrorCode::Incompatible => {
                Some("remove the snapshot with `forkd rmi TAG` and build it again")
            }
            ErrorCode::EngineUnavailable => Some("`forkd doctor` lists what is missing"),
            _ => None,
        };
        wrap(code, "the engine failed", remedy, error)
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::NotFound { .. } => ErrorCode::NotFound,
            StoreError::Exists { .. } => ErrorCode::AlreadyExists,
            StoreError::InProgress { .. }
            | StoreError::InUse { .. }
            | StoreError::HasDependents { .. } => ErrorCode::InUse,
            StoreError::Damaged { .. } => ErrorCode::Corrupt,
            StoreError::NoSpace { .. } | StoreError::Space { .. } => {
                ErrorCode::InsufficientResources
            }
            _ => ErrorCode::Internal,
        };
        transparent(code, error)
    }
}

impl From<guest::Error> for Error {
    fn from(error: guest::Error) -> Self {
        let code = error.code();
        transparent(code, error)
    }
}

impl From<record::Error> for Error {
    fn from(error: record::Error) -> Self {
        let remedy = match &error {
            record::Error::Damaged { .. } => Some(
                "move the file away: snapshots are kept apart from it, and orphaned VMs are swept",
            ),
            record::Error::Newer { .. } => Some("use the newer program, or another --state file"),
            full if full.is_disk_full() => Some("free space where the --state file is"),
            _ => None,
        };
        let code = match &error {
            record::Error::Damaged { .. } => ErrorCode::Corrupt,
            record::Error::Newer { .. } => ErrorCode::Incompatible,
            full if full.is_disk_full() => ErrorCode::InsufficientResources,
            _ => ErrorCode::Internal,
        };
        let converted = transparent(code, error);
        match remedy {
            Some(remedy) => converted.with_remedy(remedy),
            None => converted,
        }
    }
}

impl From<InvalidSpec> for Error {
    fn from(error: InvalidSpec) -> Self {
        Error::new(ErrorCode::InvalidArgument, error.0)
    }
}

/// The layer's own sentence says it all; its causes follow.
fn transparent(code: ErrorCode, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    Error::new(code, text)
}

fn wrap(
    code: ErrorCode,
    message: &str,
    remedy: Option<&str>,
    source: impl std::error::Error + Send + Sync + 'static,
) -> Error {
    let error = Error::new(code, message).with_source(source);
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}
