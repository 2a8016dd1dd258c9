//! From the flag to the engine.

use std::sync::Arc;

use forkd_engine::select::{self, Choice};
use forkd_engine::{Engine, Error};

use crate::args::{EngineArgs, EngineName, Jail};

/// The engine that was asked for.
pub fn select(args: &EngineArgs) -> Result<Arc<dyn Engine>, Error> {
    let choice = match args.engine {
        EngineName::Auto => Choice::Auto,
        EngineName::Kvm => Choice::Kvm,
        EngineName::Qemu => Choice::Qemu,
        EngineName::Firecracker => Choice::Firecracker,
        EngineName::Fake => Choice::Fake,
    };
    if args.jail == Jail::Off {
        tracing::warn!("the jail is off: whoever breaks out of a guest owns this machine");
    }
    select::select_with(choice, args.options())
}
