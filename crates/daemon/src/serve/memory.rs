//! Gives memory back that many sandboxes took, when they have ended: the allocator would keep it.

use std::time::{Duration, Instant};

use crate::state::App;

/// How often to look. Memory is given back when nothing has begun or ended between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Fewer sandboxes are not worth a walk through the heap: one takes some 70 KiB.
const WORTH: i64 = 64;

/// Looks for as long as the daemon runs.
pub(super) async fn run(app: App) {
    let there = || i64::try_from(app.node().room().sandboxes).unwrap_or(i64::MAX);
    let made = || i64::try_from(app.metrics().made()).unwrap_or(i64::MAX);
    let mut ended = Ended::none_of(there());
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if ended.are_worth_it(made(), there()) {
            let began = Instant::now();
            let given = tokio::task::spawn_blocking(forkd_host::memory::give_back).await;
            if given.is_ok() {
                tracing::debug!(took = ?began.elapsed(), "unused memory given back");
            }
        }
    }
}

/// How many sandboxes have ended. Those of the daemon before this one were not made by it, so the number may be
/// below zero.
#[derive(Debug)]
struct Ended {
    /// How many were made and are there.
    seen: (i64, i64),
    /// How many had ended when memory was given back last.
    given_back: i64,
}

impl Ended {
    /// None of those that are there has.
    fn none_of(there: i64) -> Self {
        Self {
            seen: (0, there),
            given_back: -there,
        }
    }

    /// Whether it is time, with so many `made` in all and so many `there` now.
    fn are_worth_it(&mut self, made: i64, there: i64) -> bool {
        let calm = std::mem::replace(&mut self.seen, (made, there)) == (made, there);
        let ended = made - there;
        let worth = calm && ended - self.given_back >= WORTH;
        if worth {
            self.given_back = ended;
        }
        worth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_given_back_once_when_many_have_ended_and_nothing_goes_on() {
        let mut ended = Ended::none_of(0);
        assert!(!ended.are_worth_it(1000, 1000), "all live");
        assert!(!ended.are_worth_it(1000, 1000), "all live");
        assert!(!ended.are_worth_it(1000, 400), "they are ending");
        assert!(!ended.are_worth_it(1000, 0), "they are ending");
        assert!(ended.are_worth_it(1000, 0));
        assert!(!ended.are_worth_it(1000, 0), "it has been given back");
        assert!(!ended.are_worth_it(1063, 0), "not so many");
        assert!(!ended.are_worth_it(1063, 0), "not so many");
        assert!(!ended.are_worth_it(1064, 0), "the last has just ended");
        assert!(ended.are_worth_it(1064, 0), "a few at a time add up");
    }

    #[test]
    fn those_of_the_daemon_before_count_when_they_end() {
        let mut ended = Ended::none_of(100);
        for (there, worth) in [(100, false), (36, false), (36, true), (36, false)] {
            assert_eq!(ended.are_worth_it(0, there), worth);
        }
    }
}
