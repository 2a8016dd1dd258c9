//! Places at which a test kills the daemon, to see what a crash leaves behind. Compiled in with the feature
//! `crash-points` only, which nothing but tests asks for; without it a place costs nothing.
//!
//! [`all`] names every place, so that a test can walk them, and fails on one that is never reached or not named.
//! What stands around the record of a state is generic: a new state has its places at once.

use crate::machine::State;

/// Named places outside of the lifecycle machine, in the order of a life.
const STEPS: &[&str] = &[
    "snapshot: draft begun",
    "snapshot: parent booted",
    "snapshot: parent warm",
    "snapshot: parent saved",
    "snapshot: parent gone",
    "snapshot: published",
    "template: directory made",
    "template: made",
    "fork: places taken",
    "fork: recorded",
    "fork: directory made",
    "fork: VM made",
    "sandbox: vCPUs switched",
    "sandbox: VM killed",
    "branch: draft begun",
    "branch: saved",
    "branch: published",
];

/// The states whose records are written. `starting` is `fork: recorded`.
const STATES: &[&str] = &[
    "greeting",
    "running",
    "paused",
    "branching",
    "stopping",
    "ended",
];

/// Every place.
pub fn all() -> Vec<String> {
    let steps = STEPS.iter().map(|step| (*step).to_owned());
    let records = STATES
        .iter()
        .flat_map(|state| [format!("{state}: unrecorded"), format!("{state}: recorded")]);
    steps.chain(records).collect()
}

fn name(state: &State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Greeting => "greeting",
        State::Running => "running",
        State::Paused => "paused",
        State::Branching { .. } => "branching",
        State::Stopping { .. } => "stopping",
        State::Ended { .. } => "ended",
    }
}

/// A record is about to be written.
pub(crate) fn unrecorded(state: &State) {
    if cfg!(feature = "crash-points") {
        point(&format!("{}: unrecorded", name(state)));
    }
}

/// A record was written; its effects come next.
pub(crate) fn recorded(state: &State) {
    if cfg!(feature = "crash-points") {
        point(&format!("{}: recorded", name(state)));
    }
}

/// This place was reached.
#[cfg(not(feature = "crash-points"))]
pub fn point(_place: &str) {}

#[cfg(feature = "crash-points")]
pub use armed::point;

#[cfg(feature = "crash-points")]
mod armed {
    use std::io::Write;
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    /// Names the place at which to die, as `PLACE` or `PLACE#N` for the n-th time, counted from 1.
    const DIE_AT: &str = "FORKD_CRASH_AT";
    /// Names a file to which every place is written as it is reached.
    const TRACE: &str = "FORKD_CRASH_TRACE";

    #[derive(Debug)]
    struct Plan {
        die_at: Option<(String, u64)>,
        trace: Option<PathBuf>,
    }

    static PLAN: OnceLock<Plan> = OnceLock::new();
    static REACHED: AtomicU64 = AtomicU64::new(0);

    fn plan() -> Plan {
        let die_at = std::env::var(DIE_AT).ok().map(|text| {
            let counted = text.rsplit_once('#');
            let counted =
                counted.and_then(|(place, nth)| Some((place.to_owned(), nth.parse().ok()?)));
            counted.unwrap_or((text, 1))
        });
        let trace = std::env::var_os(TRACE).map(PathBuf::from);
        Plan { die_at, trace }
    }

    /// This place was reached.
    pub fn point(place: &str) {
        let plan = PLAN.get_or_init(plan);
        if let Some(file) = &plan.trace
            && let Ok(mut file) = std::fs::File::options()
                .create(true)
                .append(true)
                .open(file)
        {
            // What is not written is missed by the test.
            let _ = file.write_all(format!("{place}\n").as_bytes());
        }
        if let Some((wanted, nth)) = &plan.die_at
            && wanted == place
            && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == *nth
        {
            // As an operator's kill -9: nothing is dropped, nothing is flushed.
            let _ = kill_process(getpid(), Signal::KILL);
            std::process::abort();
        }
    }
}
