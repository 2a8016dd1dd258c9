//! From the flag to the engine.

use std::sync::Arc;

use forkd_engine::{Engine, Error};

use crate::args::EngineName;

/// The engine of this name, checked for being usable here.
pub fn select(name: EngineName) -> Result<Arc<dyn Engine>, Error> {
    todo!("{name:?}")
}
