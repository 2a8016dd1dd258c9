//! What the daemon counts and measures, in Prometheus' text format.

use std::time::Duration;

use forkd_sandbox::Room;
use forkd_sandbox::view::{ForkOutcome, SandboxView, SnapshotStages, SnapshotStatus, SnapshotView};
use forkd_wire::error::ErrorCode;
use prometheus::core::Collector;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::convert;

mod room;

use room::RoomMetrics;

/// From half a millisecond, a fork's best, to two minutes, its deadline.
const SECONDS: [f64; 17] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0,
];

/// Every family.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    snapshots_total: IntGauge,
    sandboxes_active: IntGauge,
    pub(crate) branches_in_flight: IntGauge,
    branch_concurrency_cap: IntGauge,
    sandboxes: IntGaugeVec,
    snapshots: IntGaugeVec,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    errors: IntCounterVec,
    fork_seconds: HistogramVec,
    forks: IntCounterVec,
    snapshot_seconds: HistogramVec,
    branch_pause_seconds: HistogramVec,
    room: RoomMetrics,
    pub(crate) connections: IntGauge,
    pub(crate) connections_refused: IntCounter,
    pub(crate) audit_failures: IntCounter,
}

/// Makes families and registers them. Names are ours and distinct, so neither step can fail.
struct Maker(Registry);

impl Maker {
    fn keep<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let family = made.expect("names and labels are literals and valid");
        self.0
            .register(Box::new(family.clone()))
            .expect("names are distinct");
        family
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.keep(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.keep(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.keep(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.keep(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn seconds(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
        self.keep(HistogramVec::new(opts, labels))
    }
}

impl Metrics {
    pub(crate) fn new(branch_cap: usize) -> Self {
        let make = Maker(Registry::new());
        let build = make.gauges("forkd_build_info", "The daemon's version.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            snapshots_total: make.gauge("forkd_snapshots_total", "Snapshots on the node."),
            sandboxes_active: make
                .gauge("forkd_sandboxes_active", "Sandboxes that have not ended."),
            branches_in_flight: make.gauge("forkd_branches_in_flight", "Branches being made."),
            branch_concurrency_cap: make.gauge(
                "forkd_branch_concurrency_cap",
                "Branches that may be made at once.",
            ),
            sandboxes: make.gauges("forkd_sandboxes", "Sandboxes by state.", &["state"]),
            snapshots: make.gauges("forkd_snapshots", "Snapshots by status.", &["status"]),
            requests: make.counters(
                "forkd_http_requests_total",
                "Requests answered.",
                &["method", "route", "status"],
            ),
            request_seconds: make.seconds(
                "forkd_http_request_seconds",
                "From the request's head to the answer's head.",
                &["route"],
            ),
            errors: make.counters(
                "forkd_errors_total",
                "Requests that failed, by code.",
                &["code"],
            ),
            fork_seconds: make.seconds(
                "forkd_fork_stage_seconds",
                "Time of a fork request until each stage: template, forked, ready.",
                &["stage"],
            ),
            forks: make.counters(
                "forkd_forks_total",
                "Forks by result: ok, failed.",
                &["result"],
            ),
            snapshot_seconds: make.seconds(
                "forkd_snapshot_stage_seconds",
                "Time of each stage of making a snapshot: boot, warm, save.",
                &["stage"],
            ),
            branch_pause_seconds: make.seconds(
                "forkd_branch_pause_seconds",
                "How long guests stood still while being branched.",
                &[],
            ),
            room: RoomMetrics::new(&make),
            connections: make.gauge("forkd_connections", "Open connections."),
            connections_refused: make.counter(
                "forkd_connections_refused_total",
                "Connections refused, all being taken.",
            ),
            audit_failures: make.counter(
                "forkd_audit_failures_total",
                "Audit lines that could not be written.",
            ),
            registry: make.0,
        };
        metrics
            .branch_concurrency_cap
            .set(i64::try_from(branch_cap).unwrap_or(i64::MAX));
        metrics
    }

    /// One request was answered.
    pub(crate) fn request(&self, method: &str, route: &str, status: u16, took: Duration) {
        self.requests
            .with_label_values(&[method, route, &status.to_string()])
            .inc();
        self.request_seconds
            .with_label_values(&[route])
            .observe(took.as_secs_f64());
    }

    /// One request failed.
    pub(crate) fn error(&self, code: ErrorCode) {
        self.errors.with_label_values(&[code.as_str()]).inc();
    }

    /// A fork request came to something.
    pub(crate) fn fork(&self, outcome: &ForkOutcome) {
        let stages = [
            ("template", outcome.template),
            ("forked", outcome.forked),
            ("ready", outcome.ready),
        ];
        for (stage, took) in stages {
            self.fork_seconds
                .with_label_values(&[stage])
                .observe(took.as_secs_f64());
        }
        for child in &outcome.children {
            let result = if child.is_ok() { "ok" } else { "failed" };
            self.forks.with_label_values(&[result]).inc();
        }
    }

    /// How many sandboxes were made since the daemon began.
    pub(crate) fn made(&self) -> u64 {
        self.forks.with_label_values(&["ok"]).get()
    }

    /// A snapshot was made.
    pub(crate) fn snapshot(&self, stages: &SnapshotStages) {
        for (stage, took) in [
            ("boot", stages.boot),
            ("warm", stages.warm),
            ("save", stages.save),
        ] {
            self.snapshot_seconds
                .with_label_values(&[stage])
                .observe(took.as_secs_f64());
        }
    }

    /// A sandbox was branched.
    pub(crate) fn branch(&self, pause: Option<Duration>) {
        if let Some(pause) = pause {
            let none: [&str; 0] = [];
            self.branch_pause_seconds
                .with_label_values(&none)
                .observe(pause.as_secs_f64());
        }
    }

    /// Everything, with the gauges of the moment.
    pub(crate) fn render(
        &self,
        sandboxes: &[SandboxView],
        snapshots: &[SnapshotView],
        room: &Room,
    ) -> String {
        self.room.set(room);
        use forkd_sandbox::view::SandboxStatus as S;
        let mut active = 0;
        for state in [S::Starting, S::Running, S::Paused, S::Stopping, S::Ended] {
            let count = sandboxes.iter().filter(|view| view.status == state).count();
            let name = label(&convert::sandbox_state(state));
            self.sandboxes.with_label_values(&[&name]).set(int(count));
            active += if state == S::Ended { 0 } else { count };
        }
        for status in [
            SnapshotStatus::Writing,
            SnapshotStatus::Ready,
            SnapshotStatus::Failed,
        ] {
            let count = snapshots
                .iter()
                .filter(|view| view.status == status)
                .count();
            let name = label(&convert::snapshot_state(status));
            self.snapshots.with_label_values(&[&name]).set(int(count));
        }
        self.sandboxes_active.set(int(active));
        self.snapshots_total.set(int(snapshots.len()));
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_default()
    }
}

fn int(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

/// A state's name, as the interface writes it.
fn label(state: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(state).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}
