//! The floor that the benchmark compares with: forked processes that make the bare system calls (VM,
//! memory slot, interrupt chip, vCPU, registers, first entry) and nothing else.
//!
//! It speaks the same messages over the same sockets, so the difference to a real fork is what the
//! real fork does on top: full state, devices, confinement, threads.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use forkd_wire::vmm::{Child, Reply, Request};
use rustix::process::{WaitId, WaitIdOptions};
use vm_memory::{Bytes, GuestAddress};

use crate::control::Channel;
use crate::controller::{Controller, Heard};
use crate::guest::{ALIVE, FILL};
use crate::kvm::{self, failed};
use crate::memory::PAGE;
use crate::start::{self, Process, Snapshot};
use crate::sys::{self, Forked, Kin};
use crate::template::Template;

/// Serves `Fork` requests with floor processes until the controller is gone.
pub fn serve(process: &Process, snapshot: &Snapshot) -> Result<Infallible, start::Error> {
    let start = Instant::now();
    let mut template = start::load_bare(process, snapshot)?;
    template.announce(start);
    let mut controller = template.controller.take();
    loop {
        match controller.hear() {
            Heard::Request(seq, Request::Fork { children }, fds) => {
                fork(&template, &controller, seq, &children, fds);
            }
            Heard::Request(_, Request::Guest { op: FILL, args }, _) => {
                plain_fork(&template, &controller, args);
            }
            Heard::Request(..) | Heard::Nothing => {}
            Heard::Gone => sys::exit_now(0),
        }
    }
}

fn fork(
    template: &Template,
    controller: &Controller,
    seq: u32,
    children: &[Child],
    fds: Vec<OwnedFd>,
) {
    let mut results = Vec::new();
    let mut pidfds = Vec::new();
    for (_, fd) in children.iter().zip(fds) {
        match sys::fork(Kin::Sibling, None) {
            Ok(Forked::Child) => {
                let channel = Channel::from(fd);
                let run = run(template, &channel);
                sys::exit_now(i32::from(run.is_err()));
            }
            Ok(Forked::Parent { pid, pidfd }) => {
                results.push(Ok(pid));
                pidfds.push(pidfd);
            }
            Err(error) => results.push(Err(crate::control::failure(&error))),
        }
    }
    let pidfds: Vec<_> = pidfds.iter().map(|pidfd| pidfd.as_fd()).collect();
    controller.reply(seq, &Reply::Forked(results), &pidfds);
}

/// The floor of a branch's pause: a process without a VM that has written as many pages of the same
/// memory forks. Reports nanoseconds.
fn plain_fork(template: &Template, controller: &Controller, [first, pages, _]: [u32; 3]) {
    let Ok(Forked::Parent { pidfd, .. }) = in_a_child(|| {
        for page in u64::from(first)..u64::from(first) + u64::from(pages) {
            let at = GuestAddress(page * PAGE);
            if template.memory.guest().write_obj(page as u32, at).is_err() {
                return;
            }
        }
        let start = Instant::now();
        let forked = sys::fork(Kin::Child, None);
        let took = start.elapsed();
        if matches!(forked, Ok(Forked::Parent { .. })) {
            let report = Reply::Report(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
            controller.reply(0, &report, &[]);
        }
    }) else {
        return;
    };
    _ = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
}

/// Runs `work` in a child, which ends with it.
fn in_a_child(work: impl FnOnce()) -> std::io::Result<Forked> {
    let forked = sys::fork(Kin::Child, None)?;
    if matches!(forked, Forked::Child) {
        work();
        sys::exit_now(0);
    }
    Ok(forked)
}

fn run(template: &Template, channel: &Channel) -> Result<(), kvm::Error> {
    let vm = kvm::create_vm(&template.host.kvm)?;
    kvm::add_memory(&vm, &template.memory)?;
    kvm::add_irqchip(&vm)?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    let (sregs, regs) = template.frozen.first_registers();
    vcpu.set_sregs(sregs)
        .map_err(failed("set the segment registers"))?;
    vcpu.set_regs(regs).map_err(failed("set the registers"))?;
    vcpu.run().map_err(failed("enter the guest"))?;
    _ = channel.reply(0, &Reply::Report(ALIVE), &[]);
    // Idle as a real sandbox is, until the controller is gone.
    while let Ok(Some(_)) = channel.receive() {}
    Ok(())
}
