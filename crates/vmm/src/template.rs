//! A frozen machine held in memory: forks it, and writes it to disk when it was born of a branch.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use forkd_wire::vmm::{Child, Failure, FdSet, Reply, Request, State};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{WaitId, WaitIdOptions};

use crate::control::failure;
use crate::controller::{Controller, Heard};
use crate::host::Host;
use crate::machine::Frozen;
use crate::memory::Memory;
use crate::role::Role;
use crate::sandbox::{Birth, Given, Sandbox};
use crate::sys::{self, Forked};
use crate::writer::{self, Scope};

/// What a template is made of; everything a fork shares with it.
#[derive(Debug)]
pub struct Template {
    /// What the process knows of KVM.
    pub host: Arc<Host>,
    /// Guest RAM; never touched here.
    pub memory: Arc<Memory>,
    /// The rest of the machine.
    pub frozen: Arc<Frozen>,
    /// The snapshot on disk that the memory's file-backed pages come from; empty for none.
    pub base: String,
    /// The machine's disks, read-only and shared by all forks.
    pub disks: Arc<Vec<File>>,
    /// Who gives orders.
    pub controller: Controller,
    /// Whether it was born of a branch, so that it can be written; more than once, if files are lost.
    pub born: bool,
    /// Whether the snapshot is on disk.
    pub state: State,
    /// Why the last write failed.
    pub write_error: String,
    /// Children so far.
    pub forks: u64,
    /// The process that writes the snapshot.
    pub writer: Option<OwnedFd>,
}

impl Template {
    /// Tells the controller that forks are welcome.
    pub fn announce(&self, since: Instant) {
        let ready = Reply::Ready {
            memory_mib: self.memory.mib(),
            vcpus: self.frozen.vcpus() as u32,
            load_us: u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX),
            privileged: privileged(),
        };
        self.controller.reply(0, &ready, &[]);
    }

    /// Serves requests. Returns in a forked child as the new sandbox, or at the end.
    pub fn serve(self: Box<Self>) -> Role {
        let mut this = self.settled();
        loop {
            if let Some(end) = this.wait() {
                return end;
            }
            match this.controller.hear() {
                Heard::Request(seq, request, fds) => {
                    let at = Instant::now();
                    if let Some(role) = this.handle(seq, request, fds, at) {
                        // Freeing what the template holds would only copy pages it shares with its
                        // forks: everything that must be closed has been.
                        std::mem::forget(this);
                        return role;
                    }
                }
                Heard::Nothing => {}
                Heard::Gone => return Role::End(0),
            }
        }
    }

    /// Loading is over: what forks write to comes to lie side by side, with nothing else around it.
    ///
    /// Not inlined: its large values would widen the stack that every fork goes on writing to.
    #[inline(never)]
    fn settled(self: Box<Self>) -> Box<Template> {
        let mut this = unboxed(self);
        let host = Arc::try_unwrap(this.host);
        let memory = Arc::try_unwrap(this.memory);
        let disks = Arc::try_unwrap(this.disks);
        let frozen = Arc::try_unwrap(this.frozen).map(Frozen::apart);
        let channel = this.controller.take_channel().map(Arc::try_unwrap);
        // In this order: their old places must not be taken again.
        sys::retire_heap();
        this.host = moved(host);
        this.memory = moved(memory);
        this.frozen = moved(frozen.map(|(frozen, defaults)| frozen.with(moved(defaults))));
        this.disks = moved(disks);
        this.controller.put_channel(channel.map(moved));
        Box::new(this)
    }

    /// Waits until the controller has something to say; looks after the writer meanwhile.
    fn wait(&mut self) -> Option<Role> {
        loop {
            let controller = self.controller.fd()?;
            // Without a writer there is nothing else to wait for: the receive itself waits.
            let Some(writer) = &self.writer else {
                return None;
            };
            let mut fds = [
                PollFd::new(&controller, PollFlags::IN),
                PollFd::new(writer, PollFlags::IN),
            ];
            _ = rustix::event::poll(&mut fds, None);
            let heard = !fds[0].revents().is_empty();
            if !fds[1].revents().is_empty() {
                self.writer_ended();
            }
            if heard {
                return None;
            }
        }
    }

    fn writer_ended(&mut self) {
        let Some(pidfd) = self.writer.take() else {
            return;
        };
        let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        let code = status
            .ok()
            .flatten()
            .and_then(|status| status.exit_status());
        (self.state, self.write_error) = match code {
            Some(0) => (State::Ready, String::new()),
            Some(errno) if errno != 255 => {
                let reason = std::io::Error::from_raw_os_error(errno);
                (
                    State::Memory,
                    format!("cannot write the snapshot: {reason}"),
                )
            }
            _ => (
                State::Memory,
                "the process that wrote the snapshot was killed".to_owned(),
            ),
        };
    }

    fn handle(
        &mut self,
        seq: u32,
        request: Request,
        fds: Vec<OwnedFd>,
        at: Instant,
    ) -> Option<Role> {
        match request {
            Request::Fork { children } => return self.fork(seq, children, fds, at),
            Request::Write => return self.write(seq, fds),
            Request::Status => {
                let write_error = self.write_error.clone();
                let status = Reply::Status {
                    state: self.state,
                    forks: self.forks,
                    write_error,
                };
                self.controller.reply(seq, &status, &[]);
            }
            Request::Stop => return Some(Role::End(0)),
            _ => self
                .controller
                .refuse(seq, libc::EINVAL, "this is a template, not a sandbox"),
        }
        None
    }

    fn fork(
        &mut self,
        seq: u32,
        children: Vec<Child>,
        fds: Vec<OwnedFd>,
        at: Instant,
    ) -> Option<Role> {
        let expected: usize = children.iter().map(|child| child.fds.count()).sum();
        if fds.len() != expected {
            let message = format!(
                "{} descriptors came, the children need {expected}",
                fds.len()
            );
            self.controller.refuse(seq, libc::EINVAL, &message);
            return None;
        }
        let mut fds = fds.into_iter();
        let mut results = Vec::with_capacity(children.len());
        let mut pidfds = Vec::with_capacity(children.len());
        let mut children = children.into_iter();
        while let Some(child) = children.next() {
            let given = Given::take(child.fds, &mut fds);
            match fork_child(&child, &given) {
                Ok(Forked::Child) => {
                    // Nothing of the siblings and of the template may stay open here.
                    fds.by_ref().for_each(drop);
                    pidfds.drain(..).for_each(drop);
                    std::mem::forget((children, results));
                    return Some(self.become_sandbox(child, given, at));
                }
                Ok(Forked::Parent { pid, pidfd }) => {
                    self.forks += 1;
                    results.push(Ok(pid));
                    pidfds.push(pidfd);
                }
                Err(refused) => results.push(Err(refused)),
            }
        }
        let pidfds: Vec<_> = pidfds.iter().map(|pidfd| pidfd.as_fd()).collect();
        self.controller.reply(seq, &Reply::Forked(results), &pidfds);
        None
    }

    fn become_sandbox(&mut self, child: Child, given: Given, at: Instant) -> Role {
        self.writer = None;
        let birth = Birth {
            host: self.host.clone(),
            memory: self.memory.clone(),
            frozen: self.frozen.clone(),
            base: self.base.clone(),
            disks: self.disks.clone(),
            at,
        };
        let (controller, resources) = given.into_parts();
        // Replacing the template's own controller closes its sockets in this process.
        self.controller = controller;
        let channel = self.controller.channel().cloned();
        match Sandbox::be_born(birth, &child, resources, &mut self.controller) {
            Ok(sandbox) => Role::Sandbox(Box::new(sandbox)),
            Err(error) => {
                if let Some(channel) = channel {
                    _ = channel.reply(0, &Reply::Failed(failure(&error)), &[]);
                }
                Role::End(1)
            }
        }
    }

    fn write(&mut self, seq: u32, fds: Vec<OwnedFd>) -> Option<Role> {
        if self.writer.is_some() || !self.born {
            let message = "the snapshot is being written, or was loaded from disk";
            self.controller.refuse(seq, libc::EALREADY, message);
            return None;
        }
        let scope = if self.base.is_empty() {
            Scope::Everything
        } else {
            Scope::Own
        };
        let files = match writer::Files::take(fds) {
            Ok(files) => files,
            Err(error) => {
                self.controller.fail(seq, &error);
                return None;
            }
        };
        match sys::fork(sys::Kin::Child, None) {
            Ok(Forked::Child) => {
                let code = writer::run(
                    &self.controller,
                    seq,
                    &self.memory,
                    &self.frozen,
                    files,
                    scope,
                );
                return Some(Role::End(code));
            }
            Ok(Forked::Parent { pidfd, .. }) => {
                self.writer = Some(pidfd);
                self.state = State::Writing;
                self.write_error.clear();
            }
            Err(error) => self.controller.refuse(
                seq,
                error.raw_os_error().unwrap_or(libc::EAGAIN),
                &format!("cannot fork a process to write the snapshot: {error}"),
            ),
        }
        None
    }
}

/// The value itself; its old place is free when this returns.
#[expect(clippy::boxed_local, reason = "to free the box is the point")]
fn unboxed<T>(value: Box<T>) -> T {
    *value
}

/// What was unwrapped, in a new place; what somebody else refers to stays where it is.
fn moved<T>(unwrapped: Result<T, Arc<T>>) -> Arc<T> {
    unwrapped.map_or_else(|shared| shared, Arc::new)
}

/// Whether children can be given users and cgroups.
fn privileged() -> bool {
    rustix::process::geteuid().is_root()
}

fn fork_child(child: &Child, given: &Given) -> Result<Forked, Failure> {
    if !privileged() && (child.user.is_some() || child.fds.has(FdSet::CGROUP)) {
        return Err(Failure {
            errno: libc::EPERM as u32,
            message:
                "this template was born of a confined sandbox and cannot change user or cgroup: \
                      fork without them and move the child, or load the written snapshot"
                    .to_owned(),
        });
    }
    let cgroup = given.cgroup.as_ref().map(|fd: &File| fd.as_fd());
    sys::fork(sys::Kin::Sibling, cgroup).map_err(|error| Failure {
        errno: error.raw_os_error().unwrap_or(0).unsigned_abs(),
        message: format!(
            "cannot fork the template: {error}: check pids.max, ulimit -u and the cgroup's limits"
        ),
    })
}
