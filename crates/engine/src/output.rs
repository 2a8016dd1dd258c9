//! The last lines a process wrote to its standard error.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;

/// Bytes kept.
const KEPT: usize = 4096;
/// Lines told.
const LINES: usize = 4;
/// How programs begin their messages.
const PROGRAMS: [&str; 2] = ["qemu-system-x86_64: ", "forkd-vmm: "];

/// The end of an output, and whether it is complete.
#[derive(Debug)]
pub(crate) struct Output {
    tail: Mutex<Vec<u8>>,
    complete: watch::Sender<bool>,
}

impl Output {
    /// Reads a pipe to its end, keeping the last of it.
    pub(crate) fn follow(pipe: impl Into<OwnedFd>) -> Arc<Output> {
        let output = Arc::new(Output {
            tail: Mutex::new(Vec::new()),
            complete: watch::Sender::new(false),
        });
        let into = Arc::clone(&output);
        match Receiver::from_owned_fd(pipe.into()) {
            Ok(pipe) => {
                tokio::spawn(async move { into.read(pipe).await });
            }
            Err(error) => {
                tracing::warn!(%error, "a VM's messages cannot be read");
                into.complete.send_replace(true);
            }
        }
        output
    }

    /// An output that cannot be read any more: that of an adopted process.
    pub(crate) fn lost() -> Arc<Output> {
        Arc::new(Output {
            tail: Mutex::new(Vec::new()),
            complete: watch::Sender::new(true),
        })
    }

    async fn read(&self, mut pipe: Receiver) {
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
            let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
            tail.extend_from_slice(&buffer[..read]);
            let excess = tail.len().saturating_sub(KEPT);
            tail.drain(..excess);
        }
        self.complete.send_replace(true);
    }

    /// The last lines, after waiting up to `limit` for the output to be complete.
    pub(crate) async fn last_words(&self, limit: Duration) -> String {
        let mut complete = self.complete.subscribe();
        let _ = tokio::time::timeout(limit, complete.wait_for(|complete| *complete)).await;
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        last_lines(&String::from_utf8_lossy(&tail))
    }
}

/// The last lines without the program's name before each, in one.
fn last_lines(text: &str) -> String {
    let strip = |line: &str| -> String {
        let named = PROGRAMS.iter().find_map(|name| line.split_once(name));
        let (_, line) = named.unwrap_or(("", line));
        line.chars().filter(|c| !c.is_control()).collect()
    };
    let lines: Vec<String> = text
        .lines()
        .map(strip)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(LINES)..].join("; ")
}
