//! Takes the measurements.

use std::time::{Duration, Instant};

use forkd_wire::api::exec::{Eval, Exec};
use forkd_wire::api::sandbox::{CreateSandboxes, SandboxInfo};
use forkd_wire::id::{SandboxId, Tag};

use super::cpu;
use super::report::{Host, Memory, Report, Sample};
use crate::args::Bench;
use crate::client::Client;
use crate::client::api::Forked;
use crate::commands::fork::told_apart;
use crate::failure::Failure;
use crate::progress::Steps;
use crate::stats::Spread;

/// Single forks before the fan-out.
pub(super) const SINGLES: u32 = 5;
/// Further exec calls per sandbox after the first.
const REPEATS: u32 = 5;
/// How long the idle sandboxes are watched.
const IDLE: Duration = Duration::from_millis(1500);
/// Seconds the first exec or eval may take.
const CALL_SECS: u64 = 60;

/// Measures on one node.
#[derive(Debug)]
pub(super) struct Bencher {
    client: Client,
    tag: Tag,
    n: u32,
    steps: Steps,
}

impl Bencher {
    pub(super) fn new(client: Client, args: &Bench, steps: Steps) -> Self {
        Self {
            client,
            tag: args.tag.clone(),
            n: args.n,
            steps,
        }
    }

    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }

    pub(super) fn steps(&self) -> &Steps {
        &self.steps
    }

    pub(super) fn request(&self, n: u32) -> CreateSandboxes {
        CreateSandboxes::new(self.tag.clone(), n)
    }

    /// What is measured, before anything is.
    pub(super) async fn prepare(&self) -> Result<Report, Failure> {
        let version = self.client.version().await?;
        let snapshot = self.client.snapshot_info(&self.tag).await?.snapshot;
        let host = if self.client.is_local() {
            Some(Host::this())
        } else {
            None
        };
        Ok(Report {
            forkd_version: version.version,
            engine: version.engine,
            tag: self.tag.to_string(),
            image: snapshot.image,
            memory_mib: snapshot.memory_mib,
            vcpus: snapshot.vcpus,
            n: self.n,
            host,
            ..Report::default()
        })
    }

    pub(super) fn note_single(&self, report: &mut Report, forked: &Forked) {
        if report.template_ms.is_none() {
            report.template_ms = forked.template_ms;
        }
        for sandbox in told_apart(forked).0 {
            report.samples.one_fork_ms.push(sandbox.stages.forked_ms);
            report.samples.one_ready_ms.push(sandbox.stages.ready_ms);
        }
    }

    pub(super) fn note_fan_out(&self, report: &mut Report, forked: &Forked, wall_ms: f64) {
        report.fan_out_wall_ms = wall_ms;
        for sandbox in told_apart(forked).0 {
            report.samples.fork_ms.push(sandbox.stages.forked_ms);
            report.samples.ready_ms.push(sandbox.stages.ready_ms);
        }
    }

    /// Everything between the fan-out and the end.
    pub(super) async fn stages(&self, report: &mut Report, forked: &Forked) -> Result<(), Failure> {
        let made = told_apart(forked).0;
        let pids: Vec<u32> = if self.client.is_local() {
            made.iter().filter_map(|sandbox| sandbox.pid).collect()
        } else {
            Vec::new()
        };
        let step = self.steps.begin("leave them idle");
        let (ran, share) = spent(&pids, made.len(), tokio::time::sleep(IDLE)).await;
        report.idle_cpu_percent = share.map(|ms| 100.0 * ms / (ran.as_secs_f64() * 1000.0));
        report.memory_idle = self.memory(&made).await?;
        step.done("");

        let step = self
            .steps
            .begin("run a command in each, for the first time");
        self.execs(&made, 1, &mut report.samples.first_exec_ms)
            .await?;
        step.done("");
        let step = self.steps.begin(format!("run {REPEATS} more in each"));
        let more = self.execs(&made, REPEATS, &mut report.samples.exec_ms);
        let (outcome, total) = spent_on(&pids, more).await;
        outcome?;
        let calls = made.len() as f64 * f64::from(REPEATS);
        report.exec_cpu_ms = total.map(|ms| ms / calls);
        step.done("");

        let step = self.steps.begin("evaluate Python in each");
        for sandbox in &made {
            let began = Instant::now();
            let question = Eval {
                code: "1 + 1".to_owned(),
                timeout_secs: CALL_SECS,
            };
            match self.client.eval(&sandbox.id, &question).await {
                Ok(result) if result.result.as_deref() == Some("2") => {
                    report.samples.first_eval_ms.push(ms(began));
                }
                Ok(result) => {
                    report.eval_problem = Some(
                        result
                            .error
                            .unwrap_or_else(|| format!("1 + 1 came to {:?}", result.result)),
                    );
                }
                // A guest without Python is measured without eval.
                Err(failure) => report.eval_problem = Some(failure.message().to_owned()),
            }
            if report.eval_problem.is_some() {
                break;
            }
        }
        report.memory_after_eval = self.memory(&made).await?;
        step.done("");
        Ok(())
    }

    async fn execs(
        &self,
        made: &[&SandboxInfo],
        rounds: u32,
        sample: &mut Sample,
    ) -> Result<(), Failure> {
        let request = Exec {
            timeout_secs: CALL_SECS,
            ..Exec::new(["true"])
        };
        for sandbox in made {
            for _ in 0..rounds {
                let began = Instant::now();
                let result = self.client.exec(&sandbox.id, &request).await?;
                if result.exit_code != 0 {
                    let why = result.error.unwrap_or(result.stderr);
                    let code = result.exit_code;
                    return Err(Failure::new(format!(
                        "`true` ended with {code} in {}: {why}",
                        sandbox.id
                    )));
                }
                sample.push(ms(began));
            }
        }
        Ok(())
    }

    async fn memory(&self, made: &[&SandboxInfo]) -> Result<Memory, Failure> {
        let mut memory = Memory::default();
        for sandbox in made {
            let used = self.client.memory(&sandbox.id).await?;
            memory.pss.push(used.pss_kib as f64);
            memory.private.push(used.private_kib as f64);
        }
        memory.pss_kib = Spread::of(&memory.pss).unwrap_or_default();
        memory.private_kib = Spread::of(&memory.private).unwrap_or_default();
        Ok(memory)
    }

    /// Kills one after the other.
    pub(super) async fn kill(&self, report: &mut Report, ids: &[SandboxId]) -> Result<(), Failure> {
        let step = self.steps.begin("kill them");
        let mut first = None;
        for id in ids {
            let began = Instant::now();
            match self.client.kill(id).await {
                Ok(()) => report.samples.kill_ms.push(ms(began)),
                Err(failure) => first = first.or(Some(failure)),
            }
        }
        match first {
            None => step.done(""),
            Some(failure) => return Err(failure),
        }
        Ok(())
    }
}

fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

/// CPU milliseconds that each of `count` processes spent on average while something took its time.
async fn spent<T>(
    pids: &[u32],
    count: usize,
    work: impl Future<Output = T>,
) -> (Duration, Option<f64>) {
    let began = Instant::now();
    let (_, total) = spent_on(pids, work).await;
    (began.elapsed(), total.map(|ms| ms / count.max(1) as f64))
}

/// CPU milliseconds that processes spent during some work, and what the work came to.
async fn spent_on<T>(pids: &[u32], work: impl Future<Output = T>) -> (T, Option<f64>) {
    let before = if pids.is_empty() {
        None
    } else {
        cpu::total_ms(pids)
    };
    let outcome = work.await;
    let after = cpu::total_ms(pids);
    (
        outcome,
        before.zip(after).map(|(before, after)| after - before),
    )
}
