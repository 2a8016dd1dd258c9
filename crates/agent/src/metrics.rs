//! How the guest's machine is used.

use forkd_wire::agent::filesystem::Metrics;

/// Reads `/proc` and the root file system; what cannot be read is zero.
pub(crate) fn read() -> Metrics {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = kib(&memory, "MemTotal:") * 1024;
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let (disk_total, disk_used) = disk();
    Metrics {
        ts: now.tv_sec,
        cpu_count: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        cpu_used_pct: cpu(&stat),
        mem_total: total,
        mem_used: total.saturating_sub(kib(&memory, "MemAvailable:") * 1024),
        disk_total,
        disk_used,
    }
}

fn kib(meminfo: &str, name: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

/// Percent of all processors that was not idle since the start.
fn cpu(stat: &str) -> f32 {
    let line = stat.lines().next().unwrap_or("");
    let ticks: Vec<f32> = line
        .split_whitespace()
        .skip(1)
        .flat_map(str::parse)
        .collect();
    let total: f32 = ticks.iter().take(8).sum();
    let idle: f32 = ticks.iter().skip(3).take(2).sum();
    if total > 0.0 {
        100.0 * (total - idle) / total
    } else {
        0.0
    }
}

fn disk() -> (u64, u64) {
    let Ok(stat) = rustix::fs::statvfs("/") else {
        return (0, 0);
    };
    let total = stat.f_blocks * stat.f_frsize;
    (total, total.saturating_sub(stat.f_bfree * stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_tables() {
        assert_eq!(
            kib("MemTotal:  2048 kB\nMemAvailable: 5 kB\n", "MemAvailable:"),
            5
        );
        assert_eq!(cpu("cpu  10 0 10 60 20 0 0 0 0 0\ncpu0 1 1 1 1\n"), 20.0);
        assert_eq!(cpu(""), 0.0);
        assert!(read().mem_total > 0);
    }
}
