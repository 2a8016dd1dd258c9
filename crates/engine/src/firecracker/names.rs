//! Names in a VM's own directory, and in the root it sees. Firecracker puts the paths of disk and sockets into its
//! snapshots, so they are the same for all VMs and relative to where each runs: its root, or its directory where there
//! is no jail.

/// The directory that a VM may write to.
pub(super) const OWN: &str = "vm";
/// Firecracker's API.
pub(super) const API: &str = "vm/api.sock";
/// The channel to the agent.
pub(super) const VSOCK: &str = "vm/vsock.sock";
/// Device state on its way into a snapshot.
pub(super) const DEVICES: &str = "vm/devices.tmp";

/// The unpacked kernel.
pub(super) const KERNEL: &str = "kernel";
/// The initial RAM file system.
pub(super) const INITRAMFS: &str = "initramfs";
/// The root disk.
pub(super) const ROOTFS: &str = "rootfs";
/// A template's memory.
pub(super) const MEMORY: &str = "memory";
/// A template's device state.
pub(super) const STATE: &str = "state";
/// Where Firecracker writes memory to while a VM is saved.
pub(super) const DUMP: &str = "dump";

/// Where the guest's console comes out.
pub(super) const CONSOLE: &str = "console.fifo";
/// What the guest wrote to its console.
pub(super) const CONSOLE_LOG: &str = "console.log";
/// See [`super::persist::Record`].
pub(super) const RECORD: &str = "vm.json";
/// The unpacked kernel, while it boots.
pub(super) const UNPACKED: &str = "vmlinux";
