//! A tool's output: line by line, bounded, without control characters.

use std::collections::VecDeque;
use std::io::{self, Read};

/// Lines kept for the error message.
pub(super) const TAIL_LINES: usize = 12;
/// Longer lines are cut: a tool's output is not ours to trust.
const LINE_MAX: usize = 4096;

/// The last lines of an output.
#[derive(Default)]
pub(super) struct Tail(VecDeque<String>);

impl Tail {
    pub(super) fn push(&mut self, line: String) {
        self.0.push_back(line);
        if self.0.len() > TAIL_LINES {
            self.0.pop_front();
        }
    }
}

impl From<Tail> for Vec<String> {
    fn from(tail: Tail) -> Vec<String> {
        tail.0.into()
    }
}

fn cut(line: &str) -> String {
    let end = line.floor_char_boundary(LINE_MAX);
    // Terminal control characters of a tool have no business in our messages.
    line[..end]
        .chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect()
}

/// Hands on line by line until the stream ends or `line` says that nobody listens.
pub(super) fn read_lines(mut from: impl Read, line: &mut dyn FnMut(String) -> bool) {
    let mut pending = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(n) if n > 0 => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => break,
        };
        for &byte in &buffer[..n] {
            if byte == b'\n' || byte == b'\r' {
                if !pending.is_empty() && !line(cut(&String::from_utf8_lossy(&pending))) {
                    return;
                }
                pending.clear();
            } else if pending.len() < LINE_MAX {
                pending.push(byte);
            }
        }
    }
    if !pending.is_empty() {
        line(cut(&String::from_utf8_lossy(&pending)));
    }
}
