//! Names in a VM's own directory.

/// Where a later daemon reaches the VM's process.
pub(super) const CONTROL: &str = "control.sock";
/// Streams to the guest's ports.
pub(super) const VSOCK: &str = "vsock.sock";
/// What the guest wrote to its console; the monitor bounds it.
pub(super) const CONSOLE_LOG: &str = "console.log";
/// See [`super::persist::Record`].
pub(super) const RECORD: &str = "vm.json";
/// The index of a base image, which is one piece.
pub(super) const BASE_INDEX: &str = "base.idx";
/// The index that a full save writes and nobody needs.
pub(super) const SAVE_INDEX: &str = "save.idx";
