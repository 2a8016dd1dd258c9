//! What is known of a file, as the protocol says it.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use forkd_wire::agent::filesystem::{EntryInfo, FileType};

use crate::rpc::Fault;
use crate::users::Names;

/// Describes the entry at `path`. Of a symbolic link it describes what it points to, and where.
pub(crate) fn entry(path: &Path, names: &Names) -> Result<EntryInfo, Fault> {
    let failed = |error| Fault::io("look at", &path.display().to_string(), &error);
    let own = std::fs::symlink_metadata(path).map_err(failed)?;
    let target = own
        .is_symlink()
        .then(|| std::fs::read_link(path))
        .transpose()
        .map_err(failed)?;
    let seen = match target {
        Some(_) => std::fs::metadata(path).unwrap_or_else(|_| own.clone()),
        None => own,
    };
    Ok(EntryInfo {
        name: path
            .file_name()
            .map_or_else(|| "/".into(), |name| name.to_string_lossy())
            .into(),
        kind: kind(&seen),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(seen.len()).unwrap_or(i64::MAX),
        mode: seen.mode() & 0o7777,
        permissions: permissions(&seen),
        owner: names.user(seen.uid()),
        group: names.group(seen.gid()),
        modified_time: rfc3339(seen.mtime(), seen.mtime_nsec()),
        symlink_target: target.map(|target| target.to_string_lossy().into_owned()),
    })
}

fn kind(metadata: &Metadata) -> FileType {
    if metadata.is_file() {
        FileType::File
    } else if metadata.is_dir() {
        FileType::Directory
    } else {
        FileType::Other
    }
}

/// The permission bits as `ls -l` writes them.
fn permissions(metadata: &Metadata) -> String {
    let mode = metadata.mode();
    let first = match mode & 0o170_000 {
        0o040_000 => 'd',
        0o120_000 => 'l',
        0o020_000 => 'c',
        0o060_000 => 'b',
        0o010_000 => 'p',
        0o140_000 => 's',
        _ => '-',
    };
    let bit = |at: u32, letter| if mode & (1 << at) != 0 { letter } else { '-' };
    let letters = (0..9)
        .rev()
        .map(|at| bit(at, ['x', 'w', 'r'][at as usize % 3]));
    std::iter::once(first).chain(letters).collect()
}

/// Seconds and nanoseconds since the epoch as `2026-01-31T23:59:59.5Z`.
fn rfc3339(seconds: i64, nanos: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// The date of a day counted from 1970-01-01, in the Gregorian calendar. Years are counted from March,
/// so that the leap day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_OF_400_YEARS: i64 = 146_097;
    const EPOCH_FROM_MARCH_OF_YEAR_0: i64 = 719_468;
    let days = days + EPOCH_FROM_MARCH_OF_YEAR_0;
    let era = days.div_euclid(DAYS_OF_400_YEARS);
    let day = days.rem_euclid(DAYS_OF_400_YEARS);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        assert_eq!(rfc3339(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(951_782_399, 5), "2000-02-28T23:59:59.000000005Z");
        assert_eq!(rfc3339(951_782_400, 0), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(rfc3339(1_767_225_599, 0), "2025-12-31T23:59:59.000000000Z");
        assert_eq!(rfc3339(-1, 0), "1969-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn describes_links_and_their_targets() {
        let dir = std::env::temp_dir().join(format!("forkd-agent-stat-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("file"), b"12345").unwrap();
        std::os::unix::fs::symlink("file", dir.join("link")).unwrap();
        let found = entry(&dir.join("link"), &Names::read()).unwrap();
        assert_eq!((found.kind, found.size), (FileType::File, 5));
        assert_eq!(found.symlink_target.as_deref(), Some("file"));
        assert!(
            found.permissions.starts_with("-rw"),
            "{}",
            found.permissions
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
