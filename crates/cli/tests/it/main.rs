//! The program itself, run as users run it.
//!
//! Help texts and the `fake` scenario need nothing. Everything else boots real guests with QEMU, when `FORKD_TEST_IMAGES` names an
//! image store that holds `python3-numpy` (`make test` builds it); without it those tests say that they
//! were skipped.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something does not hold"
)]
#![allow(
    clippy::print_stdout,
    reason = "tests say when they are skipped and what they keep"
)]

mod fake;
mod guest;
mod help;
mod interrupt;
mod isolation;
mod netns;
mod network;
mod oneshot;
mod trouble;
mod world;
