//! The controller's end of the line: the inherited control socket and, once it is closed, whoever
//! connects to the rendezvous listener next (a restarted daemon).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use forkd_wire::vmm::{Failure, Reply, Request};

use crate::control::{Channel, failure};

/// Who may give orders.
#[derive(Debug, Default)]
pub struct Controller {
    channel: Option<Arc<Channel>>,
    rendezvous: Option<OwnedFd>,
}

/// What the controller's descriptor had to say.
#[derive(Debug)]
pub enum Heard {
    /// A request, with its sequence number and descriptors.
    Request(u32, Request, Vec<OwnedFd>),
    /// Nothing to do: a new controller has connected, or is awaited.
    Nothing,
    /// The controller is gone and nobody can take its place.
    Gone,
}

impl Controller {
    /// Listens on `channel`, and on `rendezvous` once that is closed.
    pub fn new(channel: Channel, rendezvous: Option<OwnedFd>) -> Controller {
        Controller {
            channel: Some(Arc::new(channel)),
            rendezvous,
        }
    }

    /// The channel, for devices that report to the controller.
    pub fn channel(&self) -> Option<&Arc<Channel>> {
        self.channel.as_ref()
    }

    /// Takes the controller out, leaving nobody.
    pub fn take(&mut self) -> Controller {
        std::mem::take(self)
    }

    /// Takes the channel out, to put it back in another place.
    pub(crate) fn take_channel(&mut self) -> Option<Arc<Channel>> {
        self.channel.take()
    }

    /// Puts a channel back.
    pub(crate) fn put_channel(&mut self, channel: Option<Arc<Channel>>) {
        self.channel = channel;
    }

    /// The descriptors that must stay open.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let channel = self
            .channel
            .as_ref()
            .map(|channel| channel.as_fd().as_raw_fd());
        channel
            .into_iter()
            .chain(self.rendezvous.as_ref().map(|fd| fd.as_raw_fd()))
    }

    /// What to wait on.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        let channel = self.channel.as_ref().map(|channel| channel.as_fd());
        channel.or_else(|| self.rendezvous.as_ref().map(|fd| fd.as_fd()))
    }

    /// Takes what has arrived on [`Controller::fd`].
    pub fn hear(&mut self) -> Heard {
        let Some(channel) = &self.channel else {
            return self.accept();
        };
        match channel.next_request() {
            Ok(Some((seq, request, fds))) => Heard::Request(seq, request, fds),
            // Descriptors that do not fit, or a socket that broke: the other end is not one of ours.
            Ok(None) | Err(_) => {
                self.channel = None;
                if self.rendezvous.is_some() {
                    Heard::Nothing
                } else {
                    Heard::Gone
                }
            }
        }
    }

    fn accept(&mut self) -> Heard {
        let Some(listener) = &self.rendezvous else {
            return Heard::Gone;
        };
        match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
            Ok(fd) => self.channel = Some(Arc::new(Channel::from(fd))),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(_) => return Heard::Gone,
        }
        Heard::Nothing
    }

    /// Answers; a controller that is gone is noticed at the next look.
    pub fn reply(&self, seq: u32, reply: &Reply, fds: &[BorrowedFd<'_>]) {
        if let Some(channel) = &self.channel {
            _ = channel.reply(seq, reply, fds);
        }
    }

    /// Answers with an error and its whole chain.
    pub fn fail(&self, seq: u32, error: &(dyn std::error::Error + 'static)) {
        self.reply(seq, &Reply::Error(failure(error)), &[]);
    }

    /// Refuses a request that makes no sense here and now.
    pub fn refuse(&self, seq: u32, errno: i32, message: &str) {
        let failure = Failure {
            errno: errno.unsigned_abs(),
            message: message.to_owned(),
        };
        self.reply(seq, &Reply::Error(failure), &[]);
    }
}
