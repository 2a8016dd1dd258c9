//! From the flag to the engine.

use std::sync::Arc;

use forkd_engine::select::{self, Choice};
use forkd_engine::{Engine, Error};

use crate::args::EngineName;

/// The engine of this name.
pub fn select(name: EngineName) -> Result<Arc<dyn Engine>, Error> {
    match name {
        EngineName::Auto => select::select(Choice::Auto),
        EngineName::Kvm => select::select(Choice::Kvm),
        EngineName::Qemu => select::select(Choice::Qemu),
        EngineName::Firecracker => select::select(Choice::Firecracker),
        EngineName::Fake => select::select(Choice::Fake),
    }
}
