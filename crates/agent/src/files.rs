//! Files of the guest: `filesystem.Filesystem`, and plain uploads and downloads.

pub(crate) mod multipart;
pub(crate) mod service;
pub(crate) mod stat;
pub(crate) mod transfer;
