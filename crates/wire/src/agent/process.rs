//! Messages of the process service (E2B's `process.Process`, Connect JSON).
