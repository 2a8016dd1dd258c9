//! Tests of the qemu engine.
