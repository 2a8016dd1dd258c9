//! Names in a VM's own directory.

/// QEMU's control socket.
pub(super) const CONTROL: &str = "control.sock";
/// The channel to the agent.
pub(super) const AGENT: &str = "agent.sock";
/// The guest's serial console.
pub(super) const CONSOLE: &str = "console.sock";
/// What the guest wrote to its console.
pub(super) const CONSOLE_LOG: &str = "console.log";
/// See [`super::persist::Record`].
pub(super) const RECORD: &str = "vm.json";
/// Device state on its way into a snapshot.
pub(super) const DEVICES: &str = "devices.tmp";
