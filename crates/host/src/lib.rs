//! Owned Linux resources: processes, sparse files, namespaces, cgroups. The fence around system calls.
//!
//! Blocking, without an async runtime: async callers come through a thread that may block. Nothing
//! here knows snapshots, sandboxes or engines.

pub mod block;
pub mod cgroup;
pub mod facts;
pub mod file;
pub mod memory;
pub mod net;
pub mod orphans;
pub mod process;
pub mod sparse;
mod sys;
mod text;
pub mod tsc;

pub use text::chain;
