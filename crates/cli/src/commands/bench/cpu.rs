//! CPU time of a process on this host.

use std::path::PathBuf;

/// Nanoseconds that all threads of a process have run, from the scheduler's own count, which is exact
/// where `/proc/PID/stat` counts in ticks of 10 ms. `None` when it cannot be read.
pub(super) fn run_ns(pid: u32) -> Option<u64> {
    let tasks = std::fs::read_dir(PathBuf::from(format!("/proc/{pid}/task"))).ok()?;
    let mut total = 0;
    for task in tasks {
        let path = task.ok()?.path().join("schedstat");
        // A thread may end between listing and reading.
        let Ok(text) = std::fs::read_to_string(path) else {
            continue;
        };
        total += parse(&text)?;
    }
    Some(total)
}

/// The first field of `schedstat`: nanoseconds on a CPU.
fn parse(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Milliseconds all processes have run, if every one of them can be read.
pub(super) fn total_ms(pids: &[u32]) -> Option<f64> {
    let mut total = 0;
    for pid in pids {
        total += run_ns(*pid)?;
    }
    Some(total as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_time_grows() {
        let pid = std::process::id();
        let before = run_ns(pid).unwrap();
        let mut x = 1u64;
        for i in 0..3_000_000 {
            x = std::hint::black_box(x.wrapping_mul(31).wrapping_add(i));
        }
        std::hint::black_box(x);
        assert!(run_ns(pid).unwrap() > before);
        assert_eq!(run_ns(u32::MAX), None);
    }

    #[test]
    fn the_first_field_counts() {
        assert_eq!(parse("123 4 5\n"), Some(123));
        assert_eq!(parse(""), None);
    }
}
