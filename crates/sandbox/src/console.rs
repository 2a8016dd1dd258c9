//! The end of a guest's console, for error messages.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Bytes of console looked at; a kernel's last words with registers and stack are about half of it.
const TAIL_BYTES: u64 = 16 * 1024;
/// Lines of console told.
const TAIL_LINES: usize = 4;
/// What Linux begins the reason of its end with.
const PANIC: &str = "Kernel panic";

/// Adds the last lines of a console to a sentence. A console that cannot be read adds nothing.
pub(crate) fn with_tail(text: String, console: &Path) -> String {
    match tail(console) {
        Some(lines) if !lines.is_empty() => format!("{text}; the console ends with: {lines}"),
        _ => text,
    }
}

fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))
        .ok()?;
    let mut bytes = vec![];
    file.take(TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(printable)
        .filter(|l| !l.is_empty())
        .collect();
    let start = lines.len().saturating_sub(TAIL_LINES);
    // A kernel that panics says why first, and then much that means nothing to users.
    let cause = lines[..start].iter().rfind(|line| line.contains(PANIC));
    let told: Vec<&str> = cause
        .into_iter()
        .chain(&lines[start..])
        .map(String::as_str)
        .collect();
    Some(told.join(" | "))
}

/// A guest must not be able to move the cursor of whoever reads the message.
fn printable(line: &str) -> String {
    line.chars()
        .filter(|c| !c.is_control())
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_why_a_kernel_ended_before_the_noise() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"a\n[1.0] Kernel panic - x\n1\n2\n3\n4\n5\n").unwrap();
        let text = with_tail("it ended".into(), file.path());
        assert!(
            text.ends_with("with: [1.0] Kernel panic - x | 2 | 3 | 4 | 5"),
            "{text}"
        );
    }

    #[test]
    fn tells_the_last_lines_without_control_characters() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"1\n2\n3\r\n\x1b[31mred\n\n5\n\xff").unwrap();
        let text = with_tail("it ended".into(), file.path());
        assert!(
            text.starts_with("it ended; the console ends with: 3 | [31mred | 5 | "),
            "{text}"
        );
    }

    #[test]
    fn a_missing_console_adds_nothing() {
        assert_eq!(
            with_tail("it ended".into(), Path::new("/nonexistent")),
            "it ended"
        );
    }
}
