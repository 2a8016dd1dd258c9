//! Sizes, durations and ages for people, and durations from people.

use std::time::Duration;

/// Bytes with a binary unit: `0 B`, `1.5 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if value < 10.0 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// KiB with a binary unit.
pub(crate) fn kib(kib: u64) -> String {
    bytes(kib.saturating_mul(1024))
}

/// Milliseconds with as many digits as matter: `0.42 ms`, `185 ms`, `3.5 s`.
pub(crate) fn ms(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.2} ms")
    } else if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else if ms < 60_000.0 {
        format!("{:.2} s", ms / 1000.0)
    } else {
        format!(
            "{:.0} min {:.0} s",
            (ms / 60_000.0).floor(),
            (ms % 60_000.0) / 1000.0
        )
    }
}

/// How long ago something was: `12s`, `5m`, `3h`, `2d`.
pub(crate) fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Seconds from then to now, 0 when the clock went back.
pub(crate) fn seconds_since(unix: u64) -> u64 {
    now_unix().saturating_sub(unix)
}

/// Now, seconds since the Unix epoch.
pub(crate) fn now_unix() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

/// Reads `10m`, `1h30m`, `1.5s`, `250ms`; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration; write it like 500ms, 30s, 10m or 1h30m");
    if let Ok(seconds) = text.parse::<f64>() {
        return positive(seconds).ok_or_else(wrong);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return Err(wrong()),
        };
        rest = &rest[letters..];
        let part = positive(number * unit).ok_or_else(wrong)?;
        total = total.checked_add(part).ok_or_else(wrong)?;
    }
    if total.is_zero() {
        Err(wrong())
    } else {
        Ok(total)
    }
}

fn positive(seconds: f64) -> Option<Duration> {
    // A year is beyond any sandbox; the bound keeps the arithmetic exact.
    (seconds > 0.0 && seconds <= 366.0 * 86_400.0).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(512 << 20), "512 MiB");
        assert_eq!(kib(36), "36 KiB");
        assert!(bytes(u64::MAX).ends_with("PiB"));
    }

    #[test]
    fn times() {
        assert_eq!(ms(0.416), "0.42 ms");
        assert_eq!(ms(185.4), "185 ms");
        assert_eq!(ms(3500.0), "3.50 s");
        assert_eq!(ms(125_000.0), "2 min 5 s");
        assert_eq!(age(59), "59s");
        assert_eq!(age(7300), "2h");
    }

    fn check(text: &str, expected_ms: Option<u64>) {
        let found = parse_duration(text).ok();
        assert_eq!(found, expected_ms.map(Duration::from_millis), "{text}");
    }

    #[test]
    fn durations_from_people() {
        check("10m", Some(600_000));
        check("1h30m", Some(5_400_000));
        check("250ms", Some(250));
        check("1.5s", Some(1500));
        check("30", Some(30_000));
        for wrong in [
            "", "0", "0s", "-1", "m", "10x", "10m5", "nan", "inf", "9999999d", "1..5s",
        ] {
            check(wrong, None);
        }
    }
}
