//! A running machine and the loop of its main thread: the controller, the devices' descriptors, the
//! end of the machine.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use forkd_wire::vmm::{Child, Exit, FdSet, Reply, Request, Stages, State};

use crate::branch::Branched;
use crate::control::{Channel, failure};
use crate::controller::{Controller, Heard};
use crate::host::Host;
use crate::jail;
use crate::machine::devices::Resources;
use crate::machine::{self, Frozen, Machine, Stopwatch};
use crate::memory::Memory;
use crate::role::Role;
use crate::seccomp;
use crate::sys;
use crate::vcpu::Threads;
use crate::writer::{self, Scope};

/// Why a sandbox did not come to life.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine could not be restored.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// Privileges could not be dropped.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// No descriptors left.
    #[error("cannot share the template's disks: raise the limit on open files (ulimit -n)")]
    Disks(#[source] std::io::Error),
}

/// The descriptors that came along for one child.
#[derive(Debug)]
pub struct Given {
    control: OwnedFd,
    /// The cgroup to be born into.
    pub cgroup: Option<File>,
    tap: Option<OwnedFd>,
    vsock: Option<OwnedFd>,
    console: Option<OwnedFd>,
    rendezvous: Option<OwnedFd>,
}

impl Given {
    /// Takes the next descriptors, one for each bit of `set`. The caller has counted them.
    pub fn take(set: FdSet, fds: &mut impl Iterator<Item = OwnedFd>) -> Given {
        let mut next = |bit| if set.has(bit) { fds.next() } else { None };
        Given {
            control: next(FdSet::CONTROL)
                .expect("decoding refuses children without a control socket"),
            cgroup: next(FdSet::CGROUP).map(File::from),
            tap: next(FdSet::TAP),
            vsock: next(FdSet::VSOCK),
            console: next(FdSet::CONSOLE),
            rendezvous: next(FdSet::RENDEZVOUS),
        }
    }

    /// The controller, and what devices need but for the disks.
    pub fn into_parts(self) -> (Controller, Resources) {
        let controller = Controller::new(Channel::from(self.control), self.rendezvous);
        let control = controller
            .channel()
            .cloned()
            .expect("the controller was just given one");
        let (tap, vsock, console) = (self.tap, self.vsock, self.console);
        (
            controller,
            Resources {
                control,
                disks: Vec::new(),
                tap,
                vsock,
                console,
            },
        )
    }
}

/// What a forked child has of its template.
#[derive(Debug)]
pub struct Birth {
    /// What the process knows of KVM.
    pub host: Arc<Host>,
    /// Guest RAM.
    pub memory: Arc<Memory>,
    /// The frozen machine.
    pub frozen: Arc<Frozen>,
    /// The snapshot on disk behind the memory.
    pub base: String,
    /// The template's disks, shared by all its forks.
    pub disks: Arc<Vec<File>>,
    /// When the request arrived.
    pub at: Instant,
}

/// A running machine.
#[derive(Debug)]
pub struct Sandbox {
    pub(crate) machine: Machine,
    pub(crate) threads: Threads,
    pub(crate) controller: Controller,
    pub(crate) base: String,
    pub(crate) disks: Arc<Vec<File>>,
    pub(crate) paused: bool,
    pub(crate) branches: u64,
}

impl Sandbox {
    /// Turns a forked copy of a template into a running machine: VM, state, privileges, threads. The
    /// disks of `resources` are the template's, whatever they were.
    pub fn be_born(
        birth: Birth,
        child: &Child,
        mut resources: Resources,
        controller: &mut Controller,
    ) -> Result<Sandbox, Error> {
        let mut watch = Stopwatch::from(birth.at);
        let mut stages = Stages {
            clone_ns: watch.lap(),
            ..Stages::default()
        };
        let Birth {
            host,
            memory,
            frozen,
            base,
            disks,
            ..
        } = birth;
        let shared: Result<_, _> = disks.iter().map(File::try_clone).collect();
        resources.disks = shared.map_err(Error::Disks)?;
        let machine =
            Machine::restore(&host, &memory, &frozen, resources, &mut watch, &mut stages)?;
        jail::name_process(&child.id);
        if let Some((uid, gid)) = child.user {
            jail::become_user(uid, gid)?;
        }
        let threads = machine.start(child.paused, seccomp::confine_vcpu)?;
        stages.enter_ns = watch.lap();
        let controller = controller.take();
        controller.reply(0, &Reply::Running(stages), &[]);
        Ok(Sandbox {
            machine,
            threads,
            controller,
            base,
            disks,
            paused: child.paused,
            branches: 0,
        })
    }

    /// Runs a machine that was booted here.
    pub fn boot(
        machine: Machine,
        controller: Controller,
        disks: Arc<Vec<File>>,
    ) -> Result<Sandbox, Error> {
        let threads = machine.start(false, seccomp::confine_vcpu)?;
        controller.reply(0, &Reply::Running(Stages::default()), &[]);
        Ok(Sandbox {
            machine,
            threads,
            controller,
            base: String::new(),
            disks,
            paused: false,
            branches: 0,
        })
    }

    /// Serves until the machine ends. Returns in a branched-off child as the new template, or at the
    /// end.
    pub fn serve(mut self: Box<Self>) -> Role {
        loop {
            let heard = self.wait();
            if let Some((exit, message)) = self.machine.exit().reason() {
                let code = i32::from(exit == Exit::Internal);
                if let Some(set) = self.machine.devices().set() {
                    set.flush();
                }
                self.controller
                    .reply(0, &Reply::Exiting { exit, message }, &[]);
                return Role::End(code);
            }
            if !heard {
                continue;
            }
            match self.controller.hear() {
                Heard::Request(seq, Request::Branch { stay_paused }, fds) => {
                    match self.branch(seq, stay_paused, fds) {
                        Branched::Sandbox(sandbox) => self = sandbox,
                        Branched::Template(role) => return role,
                    }
                }
                Heard::Request(seq, request, fds) => self.handle(seq, request, fds),
                Heard::Nothing => {}
                Heard::Gone => return Role::End(0),
            }
        }
    }

    /// Waits for something to happen and lets devices work. True if the controller has spoken.
    fn wait(&mut self) -> bool {
        let mut waiting = vec![self.machine.exit().as_fd().as_raw_fd()];
        waiting.extend(self.controller.fd().map(|fd| fd.as_raw_fd()));
        let first_device = waiting.len();
        // While the machine is paused its devices stand still, so that nothing changes its memory.
        let set = self.machine.devices().set().filter(|_| !self.paused);
        waiting.extend(set.map(|set| set.as_fd().as_raw_fd()));
        let readable = sys::wait_readable(&waiting);
        if let (Some(set), Some(true)) = (set, readable.get(first_device)) {
            set.serve();
        }
        first_device == 2 && readable[1]
    }

    fn handle(&mut self, seq: u32, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Pause => {
                let start = Instant::now();
                self.pause();
                let pause_us = micros(start);
                self.controller.reply(seq, &Reply::Paused { pause_us }, &[]);
            }
            Request::Resume => {
                self.resume();
                self.controller.reply(seq, &Reply::Resumed, &[]);
            }
            Request::Save => self.save(seq, fds),
            Request::Status => {
                let state = if self.paused {
                    State::Paused
                } else {
                    State::Running
                };
                let (forks, write_error) = (self.branches, String::new());
                self.controller.reply(
                    seq,
                    &Reply::Status {
                        state,
                        forks,
                        write_error,
                    },
                    &[],
                );
            }
            Request::Stop => self.machine.exit().end(Exit::Stopped, String::new()),
            Request::Guest { op, args } => match self.machine.devices().mailbox() {
                Some(mailbox) => mailbox.put(op, args),
                None => self
                    .controller
                    .refuse(seq, libc::EINVAL, "not the built-in test guest"),
            },
            Request::Fork { .. } | Request::Write | Request::Branch { .. } => {
                let message = "this is a sandbox: only a template can be forked or written";
                self.controller.refuse(seq, libc::EINVAL, message);
            }
        }
    }

    pub(crate) fn pause(&mut self) {
        if !self.paused {
            self.threads.park();
            self.paused = true;
        }
    }

    pub(crate) fn resume(&mut self) {
        if self.paused {
            self.paused = false;
            self.threads.unpark();
        }
    }

    fn save(&mut self, seq: u32, fds: Vec<OwnedFd>) {
        if !self.paused {
            self.controller
                .refuse(seq, libc::EBUSY, "pause the sandbox before saving it");
            return;
        }
        let written = writer::Files::take(fds)
            .map_err(|e| failure(&e))
            .and_then(|files| {
                let frozen = self.machine.save().map_err(|e| failure(&e))?;
                let memory = self.machine.memory();
                writer::write(memory, &frozen, &files, Scope::Everything).map_err(|e| failure(&e))
            });
        let reply = written.unwrap_or_else(Reply::Error);
        self.controller.reply(seq, &reply, &[]);
    }
}

pub(crate) fn micros(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX)
}
