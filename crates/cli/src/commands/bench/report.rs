//! What was measured, what it means for sizing a node, and how both are told.

use serde::{Serialize, Serializer};

use crate::human;
use crate::stats::{Spread, round};
use crate::table::Table;

/// Measured values, in the order they were taken.
pub(super) type Sample = Vec<f64>;

/// KiB per GiB.
const GIB_KIB: f64 = 1024.0 * 1024.0;

/// Everything `forkd bench` tells; the object of `--json`.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Report {
    pub(super) forkd_version: String,
    pub(super) engine: String,
    pub(super) tag: String,
    pub(super) image: String,
    pub(super) memory_mib: u64,
    pub(super) vcpus: u32,
    pub(super) n: u32,
    /// Absent when the daemon is on another host.
    pub(super) host: Option<Host>,
    /// Until the snapshot's template could be forked, when it was first asked for.
    pub(super) template_ms: Option<f64>,
    /// From the request for all N to the answer of the last agent.
    #[serde(serialize_with = "tenths")]
    pub(super) fan_out_wall_ms: f64,
    /// Spreads of the samples, by stage.
    pub(super) stages: Stages,
    /// The samples themselves, milliseconds.
    pub(super) samples: Samples,
    pub(super) memory_idle: Memory,
    pub(super) memory_after_eval: Memory,
    /// Share of one CPU that an idle sandbox takes, percent.
    pub(super) idle_cpu_percent: Option<f64>,
    /// CPU time of the VM's process for one exec, milliseconds.
    pub(super) exec_cpu_ms: Option<f64>,
    /// Why there are no figures for eval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) eval_problem: Option<String>,
    pub(super) sizing: Sizing,
}

/// The machine the sandboxes ran on.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Host {
    pub(super) cpu_model: String,
    pub(super) cpus: u32,
    pub(super) memory_mib: u64,
    pub(super) kernel: String,
}

#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Samples {
    pub(super) one_fork_ms: Sample,
    pub(super) one_ready_ms: Sample,
    pub(super) fork_ms: Sample,
    pub(super) ready_ms: Sample,
    pub(super) first_exec_ms: Sample,
    pub(super) exec_ms: Sample,
    pub(super) first_eval_ms: Sample,
    pub(super) kill_ms: Sample,
}

/// Spread of each stage. `one_…` are forks made one by one, `fork` and `ready` those of the fan-out.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Stages {
    pub(super) one_fork_ms: Option<Spread>,
    pub(super) one_ready_ms: Option<Spread>,
    pub(super) fork_ms: Option<Spread>,
    pub(super) ready_ms: Option<Spread>,
    pub(super) first_exec_ms: Option<Spread>,
    pub(super) exec_ms: Option<Spread>,
    pub(super) first_eval_ms: Option<Spread>,
    pub(super) kill_ms: Option<Spread>,
}

/// Memory of the VM processes.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Memory {
    pub(super) pss_kib: Spread,
    pub(super) private_kib: Spread,
    #[serde(skip)]
    pub(super) pss: Sample,
    #[serde(skip)]
    pub(super) private: Sample,
}

/// What the figures mean for a node.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Sizing {
    /// Agents that one CPU serves when each runs one short command a second.
    pub(super) agents_per_vcpu: Option<u64>,
    /// Idle sandboxes that one GiB holds, beside what all of them share.
    pub(super) idle_sandboxes_per_gib: Option<u64>,
    /// Sandboxes after their first eval that one GiB holds, beside what all of them share.
    pub(super) warm_sandboxes_per_gib: Option<u64>,
    /// Memory that all sandboxes of the snapshot share, MiB.
    pub(super) shared_mib: f64,
}

impl Host {
    /// This host.
    pub(super) fn this() -> Self {
        let facts = forkd_host::facts::Facts::collect();
        Self {
            cpu_model: facts.cpu.model,
            cpus: facts.cpu.count,
            memory_mib: facts.memory.total_bytes >> 20,
            kernel: facts.kernel,
        }
    }
}

impl Memory {
    /// What is in several processes' PSS but in none's private memory, MiB.
    fn shared_mib(&self) -> f64 {
        let shared: f64 = self.pss.iter().sum::<f64>() - self.private.iter().sum::<f64>();
        round((shared / 1024.0).max(0.0), 1)
    }

    fn per_gib(&self) -> Option<u64> {
        let private = self.private_kib.p50;
        (private > 0.0).then(|| (GIB_KIB / private).floor() as u64)
    }
}

impl Report {
    /// Draws the conclusions when everything is measured.
    pub(super) fn conclude(&mut self) {
        let spread = |sample: &Sample| Spread::of(sample).map(|spread| spread.rounded(2));
        let samples = &self.samples;
        self.stages = Stages {
            one_fork_ms: spread(&samples.one_fork_ms),
            one_ready_ms: spread(&samples.one_ready_ms),
            fork_ms: spread(&samples.fork_ms),
            ready_ms: spread(&samples.ready_ms),
            first_exec_ms: spread(&samples.first_exec_ms),
            exec_ms: spread(&samples.exec_ms),
            first_eval_ms: spread(&samples.first_eval_ms),
            kill_ms: spread(&samples.kill_ms),
        };
        self.idle_cpu_percent = self.idle_cpu_percent.map(|percent| round(percent, 2));
        self.exec_cpu_ms = self.exec_cpu_ms.map(|ms| round(ms, 2));
        let busy_ms = self.idle_cpu_percent.zip(self.exec_cpu_ms);
        self.sizing = Sizing {
            // A percent of a second is ten milliseconds.
            agents_per_vcpu: busy_ms
                .map(|(idle, exec)| idle * 10.0 + exec)
                .filter(|ms| *ms > 0.0)
                .map(|ms| (1000.0 / ms).floor() as u64),
            idle_sandboxes_per_gib: self.memory_idle.per_gib(),
            warm_sandboxes_per_gib: self.memory_after_eval.per_gib(),
            shared_mib: self.memory_idle.shared_mib(),
        };
    }

    /// The stages with their names, in the order of a sandbox's life.
    pub(super) fn rows(&self) -> Vec<(&'static str, &Sample, Option<Spread>)> {
        let (samples, stages) = (&self.samples, &self.stages);
        vec![
            ("one fork", &samples.one_fork_ms, stages.one_fork_ms),
            (
                "one fork, agent ready",
                &samples.one_ready_ms,
                stages.one_ready_ms,
            ),
            ("fan-out: fork", &samples.fork_ms, stages.fork_ms),
            ("fan-out: agent ready", &samples.ready_ms, stages.ready_ms),
            ("first exec", &samples.first_exec_ms, stages.first_exec_ms),
            ("exec", &samples.exec_ms, stages.exec_ms),
            ("first eval", &samples.first_eval_ms, stages.first_eval_ms),
            ("kill", &samples.kill_ms, stages.kill_ms),
        ]
    }

    /// What is measured and where, in one line.
    pub(super) fn subject(&self) -> String {
        format!(
            "{} sandboxes of `{}` ({} MiB, {} vCPU), engine {}, forkd {}",
            self.n, self.tag, self.memory_mib, self.vcpus, self.engine, self.forkd_version
        )
    }

    /// The advice, one sentence per line.
    pub(super) fn advice(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let (Some(agents), Some(idle), Some(exec)) = (
            self.sizing.agents_per_vcpu,
            self.idle_cpu_percent,
            self.exec_cpu_ms,
        ) {
            lines.push(format!(
                "agents per vCPU: {agents}, each running one short command a second \
                 ({exec} ms of CPU per command, {idle} % while idle); an agent that computes all \
                 the time takes a vCPU of its own"
            ));
        }
        let per_gib = (
            self.sizing.idle_sandboxes_per_gib,
            self.sizing.warm_sandboxes_per_gib,
        );
        if let (Some(idle), Some(warm)) = per_gib {
            lines.push(format!(
                "idle sandboxes per GiB: {idle}, after their first eval {warm}, beside {} MiB that \
                 all share once; what an agent allocates comes on top",
                self.sizing.shared_mib
            ));
        }
        lines
    }

    /// Everything as text.
    pub(super) fn text(&self) -> String {
        let mut text = format!("{}\n", self.subject());
        if let Some(host) = &self.host {
            text.push_str(&format!(
                "{}, {} CPUs, {} MiB, Linux {}\n",
                host.cpu_model, host.cpus, host.memory_mib, host.kernel
            ));
        }
        let mut table = Table::new(&["STAGE", ">SAMPLES", ">P50", ">P99", ">MAX"]);
        for (name, sample, spread) in self.rows() {
            let Some(spread) = spread else { continue };
            let cells = [spread.p50, spread.p99, spread.max].map(human::ms);
            let count = sample.len().to_string();
            table.row([name.to_owned(), count].into_iter().chain(cells));
        }
        text.push_str(&format!("\n{}", table.render()));
        let wall = human::ms(self.fan_out_wall_ms);
        text.push_str(&format!(
            "\nfan-out    {wall} until all {} agents had answered\n",
            self.n
        ));
        if let Some(ms) = self.template_ms.filter(|ms| *ms > 0.0) {
            text.push_str(&format!(
                "template   {} until the snapshot could be forked\n",
                human::ms(ms)
            ));
        }
        let mut table = Table::new(&["MEMORY", ">P50", ">P99", ">MAX"]);
        let kinds = [
            ("idle", &self.memory_idle),
            ("after eval", &self.memory_after_eval),
        ];
        for (when, memory) in kinds {
            for (what, spread) in [("PSS", memory.pss_kib), ("private", memory.private_kib)] {
                let cells = [spread.p50, spread.p99, spread.max].map(|kib| human::kib(kib as u64));
                table.row([format!("{when}, {what}")].into_iter().chain(cells));
            }
        }
        text.push_str(&format!("\n{}\n", table.render()));
        if let Some(problem) = &self.eval_problem {
            text.push_str(&format!("eval was not measured: {problem}\n"));
        }
        for line in self.advice() {
            text.push_str(&format!("{line}\n"));
        }
        text
    }
}

fn tenths<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(round(*value, 1))
}

#[cfg(test)]
pub(super) fn example() -> Report {
    let sample = |from: f64, n: u32| {
        (0..n)
            .map(|i| from + f64::from(i) * 3.1)
            .collect::<Sample>()
    };
    let memory = |private: f64| {
        let private: Sample = sample(private, 10);
        let pss: Sample = private.iter().map(|kib| kib + 9000.0).collect();
        Memory {
            pss_kib: Spread::of(&pss).unwrap_or_default(),
            private_kib: Spread::of(&private).unwrap_or_default(),
            pss,
            private,
        }
    };
    let mut report = Report {
        forkd_version: "0.1.0".into(),
        engine: "qemu".into(),
        tag: "quickstart".into(),
        image: "python3-numpy".into(),
        memory_mib: 512,
        vcpus: 1,
        n: 10,
        host: Some(Host {
            cpu_model: "A <CPU> & more".into(),
            cpus: 2,
            memory_mib: 24_000,
            kernel: "6.1.0".into(),
        }),
        template_ms: Some(0.4),
        fan_out_wall_ms: 1234.56,
        samples: Samples {
            one_fork_ms: sample(40.0, 5),
            one_ready_ms: sample(180.0, 5),
            fork_ms: sample(100.0, 10),
            ready_ms: sample(600.0, 10),
            first_exec_ms: sample(20.0, 10),
            exec_ms: sample(9.0, 50),
            first_eval_ms: sample(12.0, 10),
            kill_ms: sample(5.0, 10),
        },
        memory_idle: memory(14_000.0),
        memory_after_eval: memory(21_000.0),
        idle_cpu_percent: Some(1.5),
        exec_cpu_ms: Some(8.0),
        ..Report::default()
    };
    report.conclude();
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizing_follows_from_the_figures() {
        let report = example();
        // 15 ms a second for being there, 8 ms for the command.
        assert_eq!(report.sizing.agents_per_vcpu, Some(43));
        let private = report.memory_idle.private_kib.p50;
        assert_eq!(
            report.sizing.idle_sandboxes_per_gib,
            Some((GIB_KIB / private) as u64)
        );
        assert!(
            (report.sizing.shared_mib - 87.9).abs() < 0.01,
            "{}",
            report.sizing.shared_mib
        );
        assert_eq!(report.advice().len(), 2);
    }

    #[test]
    fn nothing_measured_gives_no_advice() {
        let mut report = Report::default();
        report.conclude();
        assert!(report.advice().is_empty());
        assert!(report.text().contains("MEMORY"));
    }

    #[test]
    fn json_tells_every_stage() {
        let json = serde_json::to_value(example()).unwrap();
        for stage in [
            "one_ready_ms",
            "ready_ms",
            "first_exec_ms",
            "exec_ms",
            "kill_ms",
        ] {
            for figure in ["p50", "p99", "max"] {
                assert!(
                    json["stages"][stage][figure].is_number(),
                    "{stage} {figure}"
                );
            }
        }
        assert_eq!(json["fan_out_wall_ms"], 1234.6);
        assert!(json["memory_idle"]["private_kib"]["p50"].is_number());
    }
}
