//! When a sandbox's time is up. The record tells by the wall clock, which may be set to anything; while a daemon
//! runs, the time that passes counts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::Stop;
use crate::view::Ending;

/// What is left at an instant of the wall clock. Never more than was asked for, whatever the clock says.
pub(super) fn left(created_unix: u64, deadline_unix: u64, now: SystemTime) -> Duration {
    let asked = Duration::from_secs(deadline_unix.saturating_sub(created_unix));
    let deadline = UNIX_EPOCH + Duration::from_secs(deadline_unix);
    deadline.duration_since(now).unwrap_or_default().min(asked)
}

/// Waits for it; for ever where there is none.
pub(super) async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// What happens then.
pub(super) fn passed() -> Stop {
    Stop {
        ending: Ending::TimedOut,
        why: "its timeout passed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_jumps_adds_no_time() {
        let at = |unix: u64| UNIX_EPOCH + Duration::from_secs(unix);
        for (now, expected) in [
            (1000, 60),
            (1050, 10),
            (1060, 0),
            // Set forward by a year: over.
            (32_000_000, 0),
            // Set back, by an hour and to the epoch: the time that was asked for, and no more.
            (0, 60),
            (900, 60),
        ] {
            assert_eq!(
                left(1000, 1060, at(now)),
                Duration::from_secs(expected),
                "{now}"
            );
        }
        assert_eq!(left(1060, 1000, at(0)), Duration::ZERO);
    }
}
