//! Forking a template: many alike, or one that is given descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use forkd_wire::vmm::{Child, FdSet, Reply, Request};

use super::{Error, Process};
use crate::control::Channel;

/// Children in one request: what a template allocates for a larger one ends up copied in each child.
const BATCH: usize = 12;

impl Process {
    /// Asks a template for `count` forks. The sandboxes may not run yet.
    pub fn fork(&mut self, count: usize, paused: bool) -> Result<Vec<Process>, Error> {
        let mut sandboxes = Vec::with_capacity(count);
        let mut channels = Vec::with_capacity(count);
        let mut batches = Vec::new();
        for first in (0..count).step_by(BATCH) {
            let size = (count - first).min(BATCH);
            let pairs: io::Result<Vec<_>> = (0..size).map(|_| Channel::pair()).collect();
            let pairs = pairs.map_err(|source| Error::System {
                step: "make a socket pair",
                source,
            })?;
            let child = |number| Child {
                id: format!("sandbox-{number}"),
                user: None,
                paused,
                fds: FdSet::CONTROL,
            };
            let children = (first..first + size).map(child).collect();
            let fds: Vec<_> = pairs.iter().map(|(_, theirs)| theirs.as_fd()).collect();
            batches.push(self.send(&Request::Fork { children }, &fds)?);
            channels.extend(pairs.into_iter().map(|(ours, _)| ours));
        }
        let mut channels = channels.into_iter();
        for seq in batches {
            let (reply, pidfds) = self.answer(seq)?;
            let Reply::Forked(children) = reply else {
                return Err(Error::Unexpected(Box::new(reply)));
            };
            let mut pidfds = pidfds.into_iter();
            for (child, channel) in children.into_iter().zip(&mut channels) {
                let pid = child.map_err(Error::Refused)?;
                let pidfd = pidfds.next().ok_or(Error::Gone(pid))?;
                sandboxes.push(Process {
                    channel,
                    pid,
                    pidfd,
                    seq: 0,
                    reaped: false,
                });
            }
        }
        Ok(sandboxes)
    }

    /// Asks for one fork and waits until its guest has executed something.
    pub fn fork_one(&mut self) -> Result<Process, Error> {
        let mut sandbox = self.fork(1, false)?.remove(0);
        sandbox.alive()?;
        Ok(sandbox)
    }

    /// Asks for one fork as `child` describes it. `fds` are its descriptors in the order of their bits,
    /// but for the control socket, which is made here. The sandbox may not run yet.
    pub fn fork_with(&mut self, child: Child, fds: &[BorrowedFd<'_>]) -> Result<Process, Error> {
        let (channel, theirs) = Channel::pair().map_err(|source| Error::System {
            step: "make a socket pair",
            source,
        })?;
        let all = [&[theirs.as_fd()], fds].concat();
        let children = vec![child];
        let seq = self.send(&Request::Fork { children }, &all)?;
        match self.answer(seq)? {
            (Reply::Forked(mut children), mut pidfds) => {
                let child = children.pop().ok_or(Error::Gone(self.pid))?;
                let pid = child.map_err(Error::Refused)?;
                let pidfd = pidfds.pop().ok_or(Error::Gone(pid))?;
                Ok(Process {
                    channel,
                    pid,
                    pidfd,
                    seq: 0,
                    reaped: false,
                })
            }
            (other, _) => Err(Error::Unexpected(Box::new(other))),
        }
    }
}
