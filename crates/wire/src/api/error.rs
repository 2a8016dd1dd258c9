//! The one shape of every refusal and failure.

use serde::{Deserialize, Serialize};

use crate::error::ErrorCode;

/// What every answer with a status of 400 or above carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// What went wrong, for people. May change.
    pub error: String,
    /// What kind of failure it is, for programs. Does not change.
    pub code: ErrorCode,
    /// What would help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}
