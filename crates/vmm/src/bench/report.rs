//! The result, for machines and for people.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::Options;
use super::figures::{Figures, quantile};
use crate::control::failure;

/// Three decimals: more is noise.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn median(samples: &[f64]) -> f64 {
    round(quantile(samples, 0.5))
}

fn spread(samples: &[f64]) -> Value {
    json!({
        "min": round(quantile(samples, 0.0)),
        "p50": median(samples),
        "p99": round(quantile(samples, 0.99)),
        "max": round(quantile(samples, 1.0)),
        "samples": samples.len(),
    })
}

/// A figure with its target: name, value, limit. The first four limits are multiples of the floor.
struct Target {
    name: String,
    value: f64,
    at_most: f64,
    unit: &'static str,
}

fn ratio(figure: &[f64], floor: &[f64]) -> f64 {
    let floor = quantile(floor, 0.5);
    if floor > 0.0 {
        round(quantile(figure, 0.5) / floor)
    } else {
        0.0
    }
}

fn targets(figures: &Figures) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut add = |name: &str, value: f64, at_most: f64, unit| {
        targets.push(Target {
            name: name.to_owned(),
            value,
            at_most,
            unit,
        });
    };
    add(
        "fork_one_ms",
        ratio(&figures.fork_one, &figures.floor_one),
        1.8,
        "x floor",
    );
    add(
        "fork_100_wall_ms",
        ratio(&figures.fork_100, &figures.floor_100),
        1.6,
        "x floor",
    );
    if !figures.fork_1000.is_empty() {
        add(
            "fork_1000_wall_ms",
            ratio(&figures.fork_1000, &figures.floor_1000),
            1.6,
            "x floor",
        );
    }
    add(
        "private_kib_per_child",
        median(&figures.private_kib),
        96.0,
        "KiB",
    );
    for (dirty_mib, samples) in &figures.branch_pause {
        let at_most = match dirty_mib {
            0..=2 => 1.5,
            3..=64 => 3.0,
            _ => 12.0,
        };
        add(
            &format!("branch_pause_ms.{dirty_mib}"),
            median(samples),
            at_most,
            "ms",
        );
    }
    add(
        "branch_to_running_ms",
        median(&figures.branch_to_running),
        4.0,
        "ms",
    );
    add(
        "layers_8_ratio",
        ratio(&figures.deep_one, &figures.fork_one),
        1.1,
        "x flat",
    );
    targets
}

fn machine() -> Value {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    json!({
        "cpu": model.map_or("unknown", |(_, model)| model),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "hardware_virtualization": crate::host::hardware_virtualization(),
    })
}

/// The other engine's figures, and how many times as long it takes.
fn compared(figures: &Figures) -> Value {
    match &figures.compared {
        None => Value::Null,
        Some(Err(error)) => json!({"engine": "firecracker", "skipped": failure(error).message}),
        Some(Ok(samples)) => json!({
            "engine": "firecracker",
            "version": samples.version,
            "restore_one_ms": spread(&samples.one),
            "restore_100_wall_ms": spread(&samples.hundred),
            "private_kib": median(&samples.private_kib),
            "ratio_one": ratio(&samples.one, &figures.fork_one),
            "ratio_100": ratio(&samples.hundred, &figures.fork_100),
            "ratio_100_expected": 3.5,
        }),
    }
}

/// Pauses as multiples of a plain fork(2).
fn of_plain_fork(figures: &Figures) -> Map<String, Value> {
    let ratio = |(mib, samples): (&u32, &Vec<f64>)| {
        let floor = figures.floor_branch.get(mib)?;
        Some((mib.to_string(), json!(ratio(samples, floor))))
    };
    figures.branch_pause.iter().filter_map(ratio).collect()
}

/// Medians of the parts of a pause, for each amount of dirty memory.
fn branch_stages(figures: &Figures) -> Map<String, Value> {
    let value = |(mib, [quiesce, state, fork]): (&u32, &[Vec<f64>; 3])| {
        let value =
            json!({"quiesce": median(quiesce), "state": median(state), "fork": median(fork)});
        (mib.to_string(), value)
    };
    figures.branch_stages.iter().map(value).collect()
}

/// One object with the figures under their documented names.
pub(super) fn json(options: &Options, figures: &Figures) -> Value {
    let medians = |map: &std::collections::BTreeMap<u32, Vec<f64>>| -> Map<String, Value> {
        map.iter()
            .map(|(mib, samples)| (mib.to_string(), json!(median(samples))))
            .collect()
    };
    let optional = |samples: &[f64]| {
        if samples.is_empty() {
            Value::Null
        } else {
            json!(median(samples))
        }
    };
    let targets = targets(figures);
    let multiple = |target: &Target| (target.name.clone(), json!(target.value));
    let of_floor = targets.iter().filter(|target| target.unit == "x floor");
    let held = |target: &Target| {
        let held = target.value <= target.at_most;
        let value = json!({"value": target.value, "at_most": target.at_most, "unit": target.unit, "held": held});
        (target.name.clone(), value)
    };
    let stages: Map<String, Value> = figures
        .stage_medians()
        .into_iter()
        .map(|(name, us)| (name.to_owned(), json!(round(us))))
        .collect();
    let spreads = json!({
        "floor_one_ms": spread(&figures.floor_one),
        "floor_100_wall_ms": spread(&figures.floor_100),
        "floor_1000_wall_ms": spread(&figures.floor_1000),
        "fork_100_wall_ms": spread(&figures.fork_100),
        "fork_1000_wall_ms": spread(&figures.fork_1000),
        "private_kib_per_child": spread(&figures.private_kib),
        "branch_to_running_ms": spread(&figures.branch_to_running),
        "branch_pause_ms": figures.branch_pause.iter()
            .map(|(mib, samples)| (mib.to_string(), spread(samples))).collect::<Map<_, _>>(),
    });
    json!({
        "memory_mib": options.memory_mib,
        "rounds": options.rounds,
        "machine": machine(),
        "floor_one_ms": median(&figures.floor_one),
        "floor_100_wall_ms": median(&figures.floor_100),
        "floor_1000_wall_ms": optional(&figures.floor_1000),
        "fork_one_ms": spread(&figures.fork_one),
        "fork_100_wall_ms": median(&figures.fork_100),
        "fork_1000_wall_ms": optional(&figures.fork_1000),
        "private_kib_per_child": median(&figures.private_kib),
        "branch_pause_ms": medians(&figures.branch_pause),
        "floor_branch_ms": medians(&figures.floor_branch),
        "branch_to_running_ms": median(&figures.branch_to_running),
        "layers_8_ratio": ratio(&figures.deep_one, &figures.fork_one),
        "load_flat_ms": median(&figures.load_flat),
        "load_scattered_ms": median(&figures.load_scattered),
        "scattered_fork_one_ms": median(&figures.scattered_one),
        "multiples_of_floor": of_floor.map(multiple).collect::<Map<_, _>>(),
        "stages_us": stages,
        "branch_stages_ms": branch_stages(figures),
        "spread": spreads,
        "targets": targets.iter().map(held).collect::<Map<_, _>>(),
        "branch_pause_of_plain_fork": of_plain_fork(figures),
        "load": figures.load.json(),
        "compare": compared(figures),
    })
}

/// A table.
pub(super) fn text(figures: &Figures) -> String {
    let mut out = String::new();
    samples(&mut out, figures);
    stages(&mut out, figures);
    verdicts(&mut out, figures);
    out
}

/// Every figure: median, minimum, maximum.
fn samples(out: &mut String, figures: &Figures) {
    let mut line = |name: &str, samples: &[f64]| {
        if !samples.is_empty() {
            let (min, mid, max) = (
                quantile(samples, 0.0),
                quantile(samples, 0.5),
                quantile(samples, 1.0),
            );
            _ = writeln!(
                out,
                "{name:<28} {mid:>9.3}   ({min:.3} .. {max:.3}, {} samples)",
                samples.len()
            );
        }
    };
    line("floor, one (ms)", &figures.floor_one);
    line("fork, one", &figures.fork_one);
    line("fork, one, 8 layers deep", &figures.deep_one);
    line("floor, 100", &figures.floor_100);
    line("fork, 100", &figures.fork_100);
    line("floor, 1000", &figures.floor_1000);
    line("fork, 1000", &figures.fork_1000);
    line("private memory (KiB)", &figures.private_kib);
    for (mib, samples) in &figures.branch_pause {
        if let Some(floor) = figures.floor_branch.get(mib) {
            line(&format!("plain fork, {mib} MiB dirty"), floor);
        }
        line(&format!("branch pause, {mib} MiB dirty"), samples);
    }
    line("branch to running", &figures.branch_to_running);
    line("load, flat", &figures.load_flat);
    line("load, scattered", &figures.load_scattered);
    line("first fork of it", &figures.scattered_one);
    if let Some(Ok(other)) = &figures.compared {
        line("firecracker, one", &other.one);
        line("firecracker, 100", &other.hundred);
        line("firecracker, private (KiB)", &other.private_kib);
    }
}

/// Where the time goes.
fn stages(out: &mut String, figures: &Figures) {
    _ = writeln!(out, "\none fork, microseconds by stage:");
    for (name, us) in figures.stage_medians() {
        _ = writeln!(out, "  {name:<26} {us:>9.1}");
    }
    _ = writeln!(
        out,
        "\nbranch pause, milliseconds by stage (quiesce, state, fork):"
    );
    for (mib, [quiesce, state, fork]) in &figures.branch_stages {
        let [quiesce, state, fork] = [quiesce, state, fork].map(|samples| median(samples));
        _ = writeln!(
            out,
            "  {mib:>4} MiB dirty             {quiesce:>9.3} {state:>9.3} {fork:>9.3}"
        );
    }
}

/// What holds and what does not, and how much the figures are worth.
fn verdicts(out: &mut String, figures: &Figures) {
    _ = writeln!(out, "\ntargets:");
    for target in targets(figures) {
        let verdict = if target.value <= target.at_most {
            "held"
        } else {
            "MISSED"
        };
        let Target {
            name,
            value,
            at_most,
            unit,
        } = target;
        _ = writeln!(
            out,
            "  {name:<26} {value:>9.3} {unit}, at most {at_most}: {verdict}"
        );
    }
    match &figures.compared {
        Some(Ok(other)) => {
            let (one, hundred) = (
                ratio(&other.one, &figures.fork_one),
                ratio(&other.hundred, &figures.fork_100),
            );
            _ = writeln!(
                out,
                "\n{}: {one} x our one, {hundred} x our 100 (at least 3.5 is expected)",
                other.version
            );
        }
        Some(Err(error)) => {
            _ = writeln!(out, "\ncomparison: skipped: {}", failure(error).message);
        }
        None => {}
    }
    if let Some(complaint) = figures.load.complaint() {
        _ = writeln!(out, "\nwarning: {complaint}");
    }
}
