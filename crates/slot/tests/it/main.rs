//! Slots on a host of the tests' own: a network namespace beside a second one that is the world.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod reach;
mod slots;
mod world;
