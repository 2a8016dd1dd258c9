//! What every service of the agent has in common: the Connect protocol's codes and its framing of
//! streams.
//!
//! Source: connectrpc.com/docs/protocol, "Error Codes" and "Streaming RPCs".

use serde::{Deserialize, Serialize};

use super::ConnectError;

/// The content type of unary calls.
pub const UNARY_CONTENT_TYPE: &str = "application/json";
/// The content type of streams.
pub const STREAM_CONTENT_TYPE: &str = "application/connect+json";
/// The header that bounds a call, milliseconds. For `Start` it bounds the process.
pub const TIMEOUT_HEADER: &str = "connect-timeout-ms";

/// The most bytes of one message on a stream, and of a unary request or response.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Why a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The caller went away.
    Canceled,
    /// A bug, or something nobody foresaw.
    Unknown,
    /// The request cannot be meant.
    InvalidArgument,
    /// The time was up.
    DeadlineExceeded,
    /// What was named is not there.
    NotFound,
    /// What was to be made is there already.
    AlreadyExists,
    /// The guest's system forbids it.
    PermissionDenied,
    /// A limit is reached: memory, disk, processes.
    ResourceExhausted,
    /// The guest lacks what the call needs.
    FailedPrecondition,
    /// Cut short; may be tried again.
    Aborted,
    /// Not offered.
    Unimplemented,
    /// The guest's system failed.
    Internal,
    /// Not now.
    Unavailable,
    /// Data was lost.
    DataLoss,
    /// Who asks is not known.
    Unauthenticated,
    /// Outside of what there is.
    OutOfRange,
}

/// Every code with its name and its HTTP status.
const CODES: [(Code, &str, u16); 16] = [
    (Code::Canceled, "canceled", 499),
    (Code::Unknown, "unknown", 500),
    (Code::InvalidArgument, "invalid_argument", 400),
    (Code::DeadlineExceeded, "deadline_exceeded", 504),
    (Code::NotFound, "not_found", 404),
    (Code::AlreadyExists, "already_exists", 409),
    (Code::PermissionDenied, "permission_denied", 403),
    (Code::ResourceExhausted, "resource_exhausted", 429),
    (Code::FailedPrecondition, "failed_precondition", 400),
    (Code::Aborted, "aborted", 409),
    (Code::OutOfRange, "out_of_range", 400),
    (Code::Unimplemented, "unimplemented", 501),
    (Code::Internal, "internal", 500),
    (Code::Unavailable, "unavailable", 503),
    (Code::DataLoss, "data_loss", 500),
    (Code::Unauthenticated, "unauthenticated", 401),
];

impl Code {
    fn row(self) -> &'static (Code, &'static str, u16) {
        CODES.iter().find(|row| row.0 == self).unwrap_or(&CODES[1])
    }

    /// The name on the wire.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The HTTP status of a unary call that failed so.
    pub fn status(self) -> u16 {
        self.row().2
    }

    /// The code of a name; `Unknown` for one never heard of.
    pub fn from_name(name: &str) -> Self {
        CODES
            .iter()
            .find(|row| row.1 == name)
            .map_or(Self::Unknown, |row| row.0)
    }
}

/// The last message of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndStream {
    /// Why the stream failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ConnectError>,
}

/// Bytes before every message of a stream.
pub const ENVELOPE: usize = 5;
const END_STREAM: u8 = 2;
const COMPRESSED: u8 = 1;

/// What stands before a message: flags and length.
pub fn envelope(len: usize, end: bool) -> [u8; ENVELOPE] {
    // Messages are bounded by MAX_MESSAGE, far below 4 GiB.
    let len = (len as u32).to_be_bytes();
    [
        if end { END_STREAM } else { 0 },
        len[0],
        len[1],
        len[2],
        len[3],
    ]
}

/// An envelope cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Nobody offered compression.
    #[error("the message is compressed, which was not agreed")]
    Compressed,
    /// Longer than anybody sends.
    #[error("the message is {0} bytes long; at most {MAX_MESSAGE} are accepted")]
    TooLong(usize),
}

/// Reads what stands before a message: its length, and whether it is the stream's last.
pub fn read_envelope(bytes: [u8; ENVELOPE]) -> Result<(usize, bool), EnvelopeError> {
    let [flags, a, b, c, d] = bytes;
    let len = u32::from_be_bytes([a, b, c, d]) as usize;
    if flags & COMPRESSED != 0 {
        return Err(EnvelopeError::Compressed);
    }
    if len > MAX_MESSAGE {
        return Err(EnvelopeError::TooLong(len));
    }
    Ok((len, flags & END_STREAM != 0))
}
