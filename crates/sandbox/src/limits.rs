//! Every bound of the heart, in one place.

use std::ops::RangeInclusive;
use std::time::Duration;

/// RAM of a machine and memory limit of a sandbox, MiB.
pub const MEMORY_MIB: RangeInclusive<u64> = 64..=256 * 1024;

/// Processor time of a VM's process, thousandths of one processor.
pub const CPU_MILLI: RangeInclusive<u64> = 10..=32_000;

/// Processes and threads of a VM: one for each vCPU and a few for devices, times some when many are busy.
pub const PIDS: RangeInclusive<u64> = 64..=32_768;

/// Bytes a VM reads or writes a second.
pub const IO_BYTES: RangeInclusive<u64> = 4096..=1 << 40;

/// Reads or writes of a VM a second.
pub const IO_OPERATIONS: RangeInclusive<u64> = 1..=1_000_000_000;

/// Virtual CPUs of a machine.
pub const VCPUS: RangeInclusive<u64> = 1..=32;

/// Forks in one request.
pub const FORKS: RangeInclusive<u64> = 1..=1000;

/// Forks of one request that are under way at once; the others wait for their turn. More would not be faster on any
/// machine, and everything else the daemon does would queue behind them.
pub const FORKS_AT_ONCE: usize = 64;

/// Environment and metadata of one request, bytes together. An `execve` in the guest allows 128 KiB per string.
pub const ENV_BYTES: usize = 64 * 1024;

/// From the start of a boot to the agent's first answer. Software emulation on a loaded machine
/// needs many times the five seconds it takes on an idle one.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// A warm-up, such as importing a large library under software emulation.
pub const WARM_TIMEOUT: Duration = Duration::from_secs(600);

/// From the fork request to the last guest's answer.
pub const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// One attempt to reach an agent that should be there.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Freezing a VM into files; bounded by writing all of memory to a slow disk.
pub const SAVE_TIMEOUT: Duration = Duration::from_secs(600);

/// Branches that are written behind at once; more wait for their turn, and can be forked meanwhile.
pub const WRITES_BEHIND: usize = 4;

/// How long a branch that could not be written waits until it is tried again; twice as long each time, up to
/// the second.
pub const WRITE_AGAIN: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(60)];

/// Layers that a branch may lie over and be a layer itself; above it is written whole. Each costs a template
/// time when it is loaded.
pub const LAYERS: usize = 32;

/// How long the end of the daemon waits for branches that are being written.
pub const WRITE_AT_CLOSE: Duration = Duration::from_secs(60);

/// How long a killed VM process may take to be gone.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// Ended sandboxes the node still tells about.
pub const ENDED_KEPT: usize = 256;
