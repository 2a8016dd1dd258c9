//! Branching: a running machine is frozen into a template while it goes on running.
//!
//! ```text
//!   sandbox          ── park ── save ── fork ── unpark ──────────► runs on
//!                                        │
//!   new process                          └─ shed KVM and devices ─► Template, can be forked at once
//! ```
//!
//! The kernel copies page tables, not pages, and write-protects both sides: the pause grows with the
//! pages the machine has written since its own birth, 10 ns each or so. Devices are quiet by
//! construction: they work on the main thread, which is this one, or under a vCPU's access, and the
//! vCPUs are parked.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use forkd_wire::vmm::{Reply, State};

use crate::control::Channel;
use crate::controller::Controller;
use crate::host::Host;
use crate::jail;
use crate::machine::Frozen;
use crate::role::Role;
use crate::sandbox::{Sandbox, micros};
use crate::sys::{self, Forked};
use crate::template::Template;

/// Which process returns from a branch.
#[derive(Debug)]
pub(crate) enum Branched {
    /// The sandbox, going on.
    Sandbox(Box<Sandbox>),
    /// The copy, as a template.
    Template(Role),
}

impl Sandbox {
    /// Answers a `Branch` request.
    ///
    /// Not inlined: the frozen machine's place would widen the stack of every sandbox's loop.
    #[inline(never)]
    pub(crate) fn branch(
        mut self: Box<Self>,
        seq: u32,
        stay_paused: bool,
        fds: Vec<OwnedFd>,
    ) -> Branched {
        let start = Instant::now();
        let mut fds = fds.into_iter();
        let (control, rendezvous) = (fds.next(), fds.next());
        let Some(control) = control else {
            let message = "a branch needs the new template's control socket";
            self.controller.refuse(seq, libc::EINVAL, message);
            return Branched::Sandbox(self);
        };
        let was_paused = self.paused;
        self.pause();
        let quiesce_us = micros(start);
        let frozen = self.machine.save();
        let state_us = micros(start) - quiesce_us;
        let frozen = match frozen {
            Ok(frozen) => frozen,
            Err(error) => {
                self.go_on(was_paused);
                self.controller.fail(seq, &error);
                return Branched::Sandbox(self);
            }
        };
        match sys::fork(sys::Kin::Sibling, None) {
            Ok(Forked::Child) => {
                let controller = Controller::new(Channel::from(control), rendezvous);
                Branched::Template(self.become_template(frozen, controller, start))
            }
            Ok(Forked::Parent { pid, pidfd }) => {
                let fork_us = micros(start) - quiesce_us - state_us;
                self.go_on(was_paused || stay_paused);
                self.branches += 1;
                let pause_us = micros(start);
                let base = self.base.clone();
                let reply = Reply::Branched {
                    pid,
                    pause_us,
                    quiesce_us,
                    state_us,
                    fork_us,
                    base,
                };
                self.controller.reply(seq, &reply, &[pidfd.as_fd()]);
                Branched::Sandbox(self)
            }
            Err(error) => {
                self.go_on(was_paused);
                let errno = error.raw_os_error().unwrap_or(0);
                let message = format!("cannot fork the sandbox: {error}: check pids.max");
                self.controller.refuse(seq, errno, &message);
                Branched::Sandbox(self)
            }
        }
    }

    fn go_on(&mut self, stay_paused: bool) {
        if !stay_paused {
            self.resume();
        }
    }

    /// Sheds what belongs to the running machine: vCPUs, VM, devices, the old controller. The VM must
    /// be closed here, or it would outlive the sandbox.
    fn become_template(self, frozen: Frozen, controller: Controller, start: Instant) -> Role {
        let Sandbox {
            machine,
            threads,
            controller: old,
            base,
            disks,
            ..
        } = self;
        let (host, memory) = (machine.host().clone(), machine.memory().clone());
        jail::name_process("template");
        threads.shed();
        drop((machine, old));
        close_leftovers(&host, &controller, &disks);
        let template = Template {
            host,
            memory,
            frozen: Arc::new(frozen),
            base,
            disks,
            controller,
            born: true,
            state: State::Memory,
            write_error: String::new(),
            forks: 0,
            writer: None,
        };
        template.announce(start);
        Role::Template(Box::new(template))
    }
}

/// Values on the stacks of threads that do not exist here keep descriptors open and are never
/// dropped: close everything that the template does not use.
fn close_leftovers(host: &Host, controller: &Controller, disks: &[File]) {
    let mut keep = vec![host.kvm.as_raw_fd()];
    keep.extend(controller.descriptors());
    keep.extend(disks.iter().map(|disk| disk.as_raw_fd()));
    sys::close_all_except(&mut keep);
}
