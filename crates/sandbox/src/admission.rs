//! Whether the host has room for one more VM. A refusal before the first effect costs nothing; a host that
//! begins to swap or to kill costs every sandbox on it.

use forkd_wire::error::ErrorCode;

use crate::{Error, limits};

const KIB_PER_MIB: u64 = 1024;

/// Refuses when `needed_mib` more would leave less than the floor. Where the host does not tell how much memory
/// it has, nothing is refused.
pub(crate) fn memory(what: &str, needed_mib: u64) -> Result<(), Error> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_mib(&meminfo) {
        Some(available) => decide(what, needed_mib, available),
        None => Ok(()),
    }
}

fn decide(what: &str, needed_mib: u64, available_mib: u64) -> Result<(), Error> {
    let floor = limits::MEMORY_FLOOR_MIB;
    if available_mib >= needed_mib.saturating_add(floor) {
        return Ok(());
    }
    let text = format!(
        "too little memory for {what}: {needed_mib} MiB are needed over a reserve of {floor} MiB, \
         the host has {available_mib} MiB available"
    );
    Err(Error::new(ErrorCode::InsufficientResources, text)
        .with_remedy("kill sandboxes (`forkd ls`, `forkd kill ID`), ask for fewer, or use a smaller --memory"))
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / KIB_PER_MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:       24672344 kB\nMemAvailable:   2048000 kB\n";
        assert_eq!(available_mib(text), Some(2000));
        assert_eq!(available_mib("nonsense"), None);
    }

    #[test]
    fn keeps_the_floor() {
        let floor = limits::MEMORY_FLOOR_MIB;
        assert!(decide("a", 100, 100 + floor).is_ok());
        let error = decide("a snapshot", 100, 99 + floor).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InsufficientResources);
        assert!(error.to_string().contains("a snapshot: 100 MiB"));
        assert!(decide("overflow", u64::MAX, 1).is_err());
    }
}
