//! How busy the machine is with other work: a benchmark that is measured beside a compiler says so.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long the processors are watched for one look.
const LOOK: Duration = Duration::from_millis(400);
/// Share of processor time that others may take on a machine that counts as quiet.
const QUIET: f64 = 0.1;

/// What was seen of the machine's load.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Load averages of one minute: before the benchmark and after it.
    averages: Vec<f64>,
    /// Share of processor time taken by others, just before each round.
    shares: Vec<f64>,
    /// How long was waited for the machine to become quiet, seconds.
    waited_s: f64,
}

impl Load {
    /// Waits until others leave the machine alone, or `patience` is over; notes what it saw.
    pub(super) fn settle(&mut self, patience: Duration) {
        if self.averages.is_empty() {
            self.averages.extend(load_average());
        }
        let start = Instant::now();
        loop {
            let share = share_of_others();
            if share <= QUIET || start.elapsed() >= patience {
                self.shares.push(share);
                break;
            }
        }
        self.waited_s += start.elapsed().as_secs_f64();
    }

    /// The benchmark is over.
    pub(super) fn end(&mut self) {
        self.averages.extend(load_average());
    }

    /// Whether every round found a quiet machine.
    pub(super) fn quiet(&self) -> bool {
        self.shares.iter().all(|share| *share <= QUIET)
    }

    /// What to tell a person about it, if there is something to complain about.
    pub(super) fn complaint(&self) -> Option<String> {
        let worst = self.shares.iter().copied().fold(0.0, f64::max);
        (!self.quiet()).then(|| {
            format!(
                "the machine was busy with other work (up to {:.0} % of its processors; load average {}): \
                 absolute times are too high, multiples of the floor less so; measure again on a quiet machine, \
                 or wait longer with --patience",
                worst * 100.0,
                self.averages.iter().map(f64::to_string).collect::<Vec<_>>().join(" to "),
            )
        })
    }

    pub(super) fn json(&self) -> Value {
        let percent: Vec<f64> = self.shares.iter().map(|s| (s * 100.0).round()).collect();
        json!({
            "quiet": self.quiet(),
            "load_average": self.averages,
            "others_percent_before_rounds": percent,
            "waited_s": self.waited_s.round(),
        })
    }
}

fn load_average() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// The share of the processors' time that was used while this process slept.
fn share_of_others() -> f64 {
    let read = || std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let before = read();
    std::thread::sleep(LOOK);
    share(&before, &read())
}

/// Of two readings of `/proc/stat`: the share of the time between them that was not idle.
fn share(before: &str, after: &str) -> f64 {
    let ((busy, all), (busy_then, all_then)) = (ticks(after), ticks(before));
    let all = all.saturating_sub(all_then);
    if all == 0 {
        return 0.0;
    }
    busy.saturating_sub(busy_then) as f64 / all as f64
}

/// Busy ticks and all ticks. Idle and waiting for a disk are the fourth and fifth numbers; the ninth
/// and tenth are counted in the first two already.
fn ticks(stat: &str) -> (u64, u64) {
    let line = stat.lines().next().unwrap_or_default();
    let numbers: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .take(8)
        .map_while(|word| word.parse().ok())
        .collect();
    let all: u64 = numbers.iter().sum();
    let idle: u64 = numbers.iter().skip(3).take(2).sum();
    (all - idle, all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_the_time_between() {
        let before = "cpu  100 0 100 1000 50 0 0 0 0 0\ncpu0 1 2 3\n";
        let after = "cpu  130 0 110 1050 60 0 0 0 9 0\ncpu0 1 2 3\n";
        assert!((share(before, after) - 0.4).abs() < 1e-9);
        assert_eq!(share(before, before), 0.0);
        assert_eq!(share("", "nonsense"), 0.0);
    }

    #[test]
    fn a_busy_machine_is_complained_about() {
        let mut load = Load {
            averages: vec![6.5],
            shares: vec![0.05],
            waited_s: 1.0,
        };
        assert!(load.quiet() && load.complaint().is_none());
        load.shares.push(0.72);
        assert!(load.complaint().unwrap().contains("72 %"));
        assert_eq!(load.json()["quiet"], false);
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let mut load = Load::default();
        load.settle(Duration::ZERO);
        load.end();
        assert_eq!(load.averages.len(), 2);
        assert!((0.0..=1.0).contains(&load.shares[0]));
    }
}
