//! The heart: snapshots, templates and sandboxes of one node.
//!
//! A sandbox is a value with a state; a pure function decides what to do next; one task does it with owned host
//! resources; a record on disk lets the same function carry on after a crash. Nothing here knows HTTP
//! routes, tokens or users.
#![forbid(unsafe_code)]

mod actor;
mod admission;
mod console;
mod convert;
pub mod crash;
mod error;
pub mod guest;
mod ids;
pub mod limits;
pub mod machine;
mod node;
mod place;
pub mod record;
pub mod spec;
pub mod view;

pub use admission::{Admission, Resource, Room};
pub use error::Error;
pub use node::Node;
pub use place::{Isolation, Missing, PlaceLimits, PlaceRecord};
