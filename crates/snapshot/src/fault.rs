//! Places at which tests kill the process, to see what a crash leaves. Nothing outside of tests.

/// Says that the step named is about to begin.
#[cfg(not(test))]
pub(crate) fn point(_step: &str) {}

#[cfg(test)]
pub(crate) use armed::{arm, point};

#[cfg(test)]
mod armed {
    use std::sync::atomic::{AtomicI64, Ordering};

    static STEPS_LEFT: AtomicI64 = AtomicI64::new(i64::MAX);

    /// Kills the process at the n-th step from now, counted from 0.
    pub(crate) fn arm(steps: i64) {
        STEPS_LEFT.store(steps, Ordering::SeqCst);
    }

    /// Says that the step named is about to begin.
    pub(crate) fn point(step: &str) {
        if STEPS_LEFT.fetch_sub(1, Ordering::SeqCst) == 0 {
            eprintln!("killed before: {step}");
            std::process::abort();
        }
    }
}
