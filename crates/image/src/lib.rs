//! Builds what a guest boots: a kernel, an initramfs and a read-only root file system.
//!
//! [`Store::build`] turns a [`BuildRequest`] into an [`Image`]. Every part is cached by what went
//! into it and stored by what came out of it, so a repeated request costs nothing and an image's
//! digest names exactly the bytes a guest sees. The crate blocks, and knows neither engines nor
//! snapshots: callers take paths from an [`Image`] and ask before removing one.
//!
//! ```text
//!  kernel package ─► kernel blob ────┐
//!  agent ───────────► initramfs blob ─┼─► image record (name, digest, three blobs)
//!  debian | oci | dir ► rootfs blob ──┘
//! ```
#![forbid(unsafe_code)]

pub mod cpio;
pub mod digest;
mod error;
mod initramfs;
pub mod kernel;
pub mod modules;
pub mod name;
pub mod oci;
mod preflight;
mod progress;
pub mod rootfs;
mod store;
pub mod tool;

pub use error::Error;
pub use kernel::KernelSource;
pub use progress::{Progress, Silent, Step};
pub use rootfs::{Debian, Source};
pub use store::build::{BuildRequest, Built};
pub use store::{Image, Store};
