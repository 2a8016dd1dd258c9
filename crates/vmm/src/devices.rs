//! The machine's devices, one directory each with the same file names.
