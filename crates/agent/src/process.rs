//! Processes: started for callers, watched, reaped.
//!
//! ```text
//!   service ──► spawn ──► Process ──(pipes)──► output ──(bounded)──► every subscriber
//!                            ▲                    ▲
//!                          table ◄── reap ── exit status
//! ```
//!
//! A pipe is read only as fast as the slowest subscriber takes what it says; with no subscriber the
//! output is read and dropped, so that a process outlives the connection that started it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use forkd_wire::agent::process::{ProcessConfig, PtySize};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::sync::mpsc;

use crate::fd::Stream;

pub(crate) mod output;
pub(crate) mod service;
pub(crate) mod spawn;
pub(crate) mod table;

/// Messages of a stream that wait for the caller; each is at most one read of a pipe.
pub(crate) const QUEUE: usize = 2;

/// Where a process's input goes.
#[derive(Debug)]
pub(crate) enum Input {
    /// It was started without.
    None,
    /// Its standard input.
    Pipe(Stream),
    /// It was closed.
    Closed,
}

/// A running process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) config: ProcessConfig,
    pub(crate) tag: Option<String>,
    pub(crate) pid: u32,
    pub(crate) input: tokio::sync::Mutex<Input>,
    /// The terminal's master, if it runs on one.
    pub(crate) terminal: Option<Stream>,
    pub(crate) subscribers: Mutex<Vec<mpsc::Sender<Bytes>>>,
    /// It was reaped: its pid means nothing any more.
    pub(crate) gone: AtomicBool,
    /// Its time was up.
    pub(crate) timed_out: AtomicBool,
}

impl Process {
    /// Sends a signal to the process and to what it started, as far as they are in its group.
    pub(crate) fn signal(&self, signal: Signal) -> rustix::io::Result<()> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(rustix::io::Errno::SRCH);
        }
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        kill_process_group(pid.ok_or(rustix::io::Errno::SRCH)?, signal)
    }

    /// Kills the group. One that is gone already is what was wanted.
    pub(crate) fn kill(&self) {
        let _ = self.signal(Signal::KILL);
    }

    /// Adds a receiver of everything the process says from now on, after `first`.
    pub(crate) fn subscribe(&self, first: Bytes) -> mpsc::Receiver<Bytes> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        // The queue is empty, so it takes one message.
        let _ = sender.try_send(first);
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(sender);
        receiver
    }

    /// Hands `message` to every subscriber, at the pace of the slowest.
    pub(crate) async fn deliver(&self, message: Bytes) {
        let senders: Vec<_> = self
            .subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut left = false;
        for sender in senders {
            left |= sender.send(message.clone()).await.is_err();
        }
        if left {
            let mut all = self
                .subscribers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            all.retain(|sender| !sender.is_closed());
        }
    }

    /// Sets the size of the terminal.
    pub(crate) fn resize(&self, size: PtySize) -> rustix::io::Result<()> {
        let terminal = self.terminal.as_ref().ok_or(rustix::io::Errno::NOTTY)?;
        resize(terminal.fd(), size)
    }
}

fn resize(terminal: &OwnedFd, size: PtySize) -> rustix::io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size)
}
