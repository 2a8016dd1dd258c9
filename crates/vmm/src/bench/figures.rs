//! Samples and what is said about them.

use std::collections::BTreeMap;

use forkd_wire::vmm::Stages;

use super::firecracker;
use super::load::Load;
use crate::client::Branched;

/// Everything measured, one sample after the other; milliseconds unless the name says otherwise.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) floor_one: Vec<f64>,
    pub(super) fork_one: Vec<f64>,
    pub(super) deep_one: Vec<f64>,
    pub(super) floor_100: Vec<f64>,
    pub(super) fork_100: Vec<f64>,
    pub(super) floor_1000: Vec<f64>,
    pub(super) fork_1000: Vec<f64>,
    pub(super) private_kib: Vec<f64>,
    pub(super) branch_pause: BTreeMap<u32, Vec<f64>>,
    /// Quiesce, state, fork.
    pub(super) branch_stages: BTreeMap<u32, [Vec<f64>; 3]>,
    /// A plain fork(2) of a process without a VM that has written as much.
    pub(super) floor_branch: BTreeMap<u32, Vec<f64>>,
    pub(super) branch_to_running: Vec<f64>,
    /// Until a template was loaded: of one layer, and with a scattered one over it.
    pub(super) load_flat: Vec<f64>,
    pub(super) load_scattered: Vec<f64>,
    /// The first fork of the latter.
    pub(super) scattered_one: Vec<f64>,
    pub(super) stages: Vec<Stages>,
    pub(super) load: Load,
    /// The other engine, or why it was not measured.
    pub(super) compared: Option<Result<firecracker::Samples, firecracker::Error>>,
}

impl Figures {
    pub(super) fn branch(&mut self, dirty_mib: u32, branch: &Branched) {
        let ms = |us: u32| f64::from(us) / 1000.0;
        self.branch_pause
            .entry(dirty_mib)
            .or_default()
            .push(ms(branch.pause_us));
        let stages = self.branch_stages.entry(dirty_mib).or_default();
        for (samples, us) in stages.iter_mut().zip(branch.stages_us) {
            samples.push(ms(us));
        }
    }

    /// Median microseconds of each stage of a single fork.
    pub(super) fn stage_medians(&self) -> [(&'static str, f64); 7] {
        let median_of = |field: fn(&Stages) -> u32| {
            let samples: Vec<f64> = self
                .stages
                .iter()
                .map(|stages| f64::from(field(stages)) / 1000.0)
                .collect();
            quantile(&samples, 0.5)
        };
        [
            ("clone", median_of(|stages| stages.clone_ns)),
            ("create_vm", median_of(|stages| stages.vm_ns)),
            ("memory_slot", median_of(|stages| stages.memory_ns)),
            ("irqchip", median_of(|stages| stages.irqchip_ns)),
            ("vcpu", median_of(|stages| stages.vcpu_ns)),
            ("state", median_of(|stages| stages.state_ns)),
            ("first_entry", median_of(|stages| stages.enter_ns)),
        ]
    }
}

/// The sample at `q` (0 lowest, 1 highest) of the sorted samples; 0 without samples.
pub(super) fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((q * last as f64).round() as usize)
        .copied()
        .unwrap_or(0.0)
}

/// Private memory of a process.
pub(super) fn private_kib(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let lines = text.lines().filter(|line| line.starts_with("Private_"));
    let kib = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    Some(kib.sum())
}
