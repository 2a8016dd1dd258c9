//! What quickstart shows at the end: a table and a summary, or one JSON object.

use serde::Serialize;

use super::memo::Stages;
use super::{TAG, task, told};
use crate::human;
use crate::stats::{Spread, round};
use crate::table::Table;

/// One sandbox and what it answered.
#[derive(Debug, Clone)]
pub(super) struct Child {
    pub(super) index: u32,
    pub(super) id: String,
    pub(super) answer: Result<String, String>,
    pub(super) ready_ms: f64,
    pub(super) private_kib: Option<u64>,
}

/// Everything that was measured.
#[derive(Debug, Clone)]
pub(super) struct Report {
    pub(super) engine: String,
    pub(super) n: u32,
    pub(super) stages: Stages,
    pub(super) reused: bool,
    pub(super) fork_wall_ms: f64,
    pub(super) children: Vec<Child>,
}

/// The one object of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Json {
    engine: String,
    n: u32,
    answered: usize,
    boot_ms: f64,
    warm_ms: f64,
    snapshot_ms: f64,
    /// Whether the snapshot is of an earlier run, which then measured the three times above.
    snapshot_reused: bool,
    fork_wall_ms: f64,
    ready_ms: Spread,
    private_kib_per_child: Kib,
}

#[derive(Debug, Default, Serialize)]
struct Kib {
    p50: f64,
    max: f64,
}

impl Child {
    /// Whether it answered what the host computed.
    pub(super) fn is_right(&self) -> bool {
        self.answer
            .as_ref()
            .is_ok_and(|answer| *answer == task::expected(self.index))
    }

    fn result(&self) -> String {
        match &self.answer {
            Ok(answer) if self.is_right() => format!("{} = {answer}", task::words(self.index)),
            Ok(answer) => {
                let expected = task::expected(self.index);
                format!("wrong: {answer} instead of {expected}")
            }
            Err(error) => format!("failed: {error}"),
        }
    }
}

impl Report {
    fn answered(&self) -> usize {
        self.children
            .iter()
            .filter(|child| child.is_right())
            .count()
    }

    /// Whether every sandbox that was asked for answered rightly.
    pub(super) fn is_complete(&self) -> bool {
        self.answered() == self.n as usize
    }

    fn ready(&self) -> Spread {
        let sample: Vec<f64> = self.children.iter().map(|child| child.ready_ms).collect();
        Spread::of(&sample).unwrap_or_default()
    }

    fn private(&self) -> Option<Spread> {
        let kib = self.children.iter().filter_map(|child| child.private_kib);
        Spread::of(&kib.map(|kib| kib as f64).collect::<Vec<f64>>())
    }

    /// The object of `--json`.
    pub(super) fn json(&self) -> Json {
        let private = self.private();
        Json {
            engine: self.engine.clone(),
            n: self.n,
            answered: self.answered(),
            boot_ms: round(self.stages.boot_ms, 1),
            warm_ms: round(self.stages.warm_ms, 1),
            snapshot_ms: round(self.stages.snapshot_ms, 1),
            snapshot_reused: self.reused,
            fork_wall_ms: round(self.fork_wall_ms, 1),
            ready_ms: self.ready().rounded(1),
            private_kib_per_child: private.map_or_else(Kib::default, |kib| Kib {
                p50: kib.p50,
                max: kib.max,
            }),
        }
    }

    /// The table and the summary; the last line says how many answered.
    pub(super) fn text(&self) -> String {
        let mut table = Table::new(&["SANDBOX", "RESULT", ">READY", ">PRIVATE"]);
        for child in &self.children {
            table.row([
                child.id.clone(),
                child.result(),
                human::ms(child.ready_ms),
                child.private_kib.map_or_else(|| "-".to_owned(), human::kib),
            ]);
        }
        let ready = self.ready();
        let mut text = format!("\n{}\n", table.render());
        let mut add = |name: &str, value: String| {
            text.push_str(&format!("{name:<10}{value}\n"));
        };
        add("engine", self.engine.clone());
        add("boot", told(self.stages.boot_ms, self.reused));
        add("warm-up", told(self.stages.warm_ms, self.reused));
        add("snapshot", told(self.stages.snapshot_ms, self.reused));
        add(
            "fork",
            format!(
                "{} until all {} had answered",
                human::ms(self.fork_wall_ms),
                self.n
            ),
        );
        let (p50, p99, max) = (
            human::ms(ready.p50),
            human::ms(ready.p99),
            human::ms(ready.max),
        );
        add("ready", format!("p50 {p50}, p99 {p99}, max {max}"));
        if let Some(kib) = self.private() {
            let (p50, max) = (human::kib(kib.p50 as u64), human::kib(kib.max as u64));
            add(
                "private",
                format!("p50 {p50}, max {max} per sandbox, after its computation"),
            );
        }
        add(
            "next",
            format!("forkd serve &   forkd fork --tag {TAG} -n 3   forkd ls"),
        );
        text.push_str(&format!(
            "{} of {} sandboxes answered\n",
            self.answered(),
            self.n
        ));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(n: u32, wrong: Option<u32>) -> Report {
        let child = |index| Child {
            index,
            id: format!("sb-{index}"),
            answer: if Some(index) == wrong {
                Ok("7".to_owned())
            } else {
                Ok(task::expected(index))
            },
            ready_ms: 100.0 + f64::from(index),
            private_kib: Some(1000 + u64::from(index)),
        };
        Report {
            engine: "fake".to_owned(),
            n,
            stages: Stages {
                boot_ms: 3000.0,
                warm_ms: 900.0,
                snapshot_ms: 80.0,
            },
            reused: false,
            fork_wall_ms: 1234.56,
            children: (0..n).map(child).collect(),
        }
    }

    #[test]
    fn the_last_line_counts_the_answers() {
        let good = report(10, None);
        assert!(good.is_complete());
        assert_eq!(
            good.text().lines().last(),
            Some("10 of 10 sandboxes answered")
        );
        let bad = report(10, Some(3));
        assert!(!bad.is_complete());
        assert_eq!(
            bad.text().lines().last(),
            Some("9 of 10 sandboxes answered")
        );
        assert!(bad.text().contains("wrong: 7 instead of"));
    }

    #[test]
    fn json_has_the_documented_keys() {
        let json = serde_json::to_value(report(3, None).json()).unwrap();
        let mut keys: Vec<&str> = json
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        let expected = [
            "answered",
            "boot_ms",
            "engine",
            "fork_wall_ms",
            "n",
            "private_kib_per_child",
            "ready_ms",
            "snapshot_ms",
            "snapshot_reused",
            "warm_ms",
        ];
        assert_eq!(keys, expected);
        assert_eq!(json["ready_ms"]["max"], 102.0);
        assert_eq!(json["private_kib_per_child"]["p50"], 1001.0);
        assert_eq!(json["fork_wall_ms"], 1234.6);
    }
}
