//! System calls a process of the monitor may make, by kind of thread. Anything else kills the whole
//! process, which is one sandbox.
//!
//! * The **main thread's** filter is installed once in the template, after loading, and inherited by
//!   every fork and branch. It allows what a template, a sandbox's event loop and a snapshot writer
//!   need; it allows no `open`, no `exec`, no sockets of its own, no `ptrace`.
//! * A **vCPU thread** handles what the guest provokes and gets a second filter on top, which takes away
//!   what only the main thread does: of KVM only running the vCPU and raising interrupts remain, no fork,
//!   no change of privileges. The kernel asks both filters, so the second one need not list again what
//!   the first allows. It is short because every fork installs it anew.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::sys;

/// Why confinement failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rules do not compile: a mistake in this file.
    #[error("cannot compile the system call filter")]
    Compile(#[source] seccompiler::BackendError),
    /// The kernel refuses filters.
    #[error(
        "cannot install the system call filter: the kernel needs CONFIG_SECCOMP_FILTER, or use --no-seccomp to go without"
    )]
    Install(#[source] seccompiler::Error),
}

/// What every thread does: move bytes, wait, manage memory, end.
const EVERY_THREAD: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What only the main thread does: fork, become another user, start threads, write snapshots.
const MAIN_THREAD: &[i64] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close_range,
    libc::SYS_epoll_create1,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_geteuid,
    libc::SYS_prctl,
    libc::SYS_rt_sigaction,
    libc::SYS_seccomp,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_waitid,
];

/// Every KVM request has this type byte.
const KVM_TYPE: u64 = 0xae00;
const TYPE_MASK: u64 = 0xff00;
const KVM_RUN: u64 = 0xae80;
const KVM_IRQ_LINE: u64 = 0x4008_ae61;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const FIONBIO: u64 = 0x5421;
/// A fork sets up the tap it was given: the header's length and what may be left undone in a frame.
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
/// A guest's driver says which frames it takes while its vCPU writes to the device.
const VCPU_IOCTLS: [u64; 4] = [KVM_RUN, KVM_IRQ_LINE, FIONBIO, TUNSETOFFLOAD];

static VCPU_FILTER: OnceLock<BpfProgram> = OnceLock::new();

/// Confines this thread, and every process forked from it, as a main thread; prepares the filter of
/// vCPU threads. Call it last before serving.
pub fn confine_main() -> Result<(), Error> {
    let kvm = condition(SeccompCmpOp::MaskedEq(TYPE_MASK), KVM_TYPE)?;
    let ioctls = [
        kvm,
        equal(PAGEMAP_SCAN)?,
        equal(FIONBIO)?,
        equal(TUNSETVNETHDRSZ)?,
        equal(TUNSETOFFLOAD)?,
    ];
    let ioctls: Result<Vec<_>, _> = ioctls.into_iter().map(|one| rule(vec![one])).collect();
    let main = compile(
        &[EVERY_THREAD, MAIN_THREAD].concat(),
        ioctls?,
        SeccompAction::Allow,
        SeccompAction::KillProcess,
    )?;
    _ = VCPU_FILTER.set(vcpu_filter()?);
    seccompiler::apply_filter(&main).map_err(Error::Install)
}

/// Confines a vCPU thread, if the process is confined at all.
pub fn confine_vcpu() {
    let Some(filter) = VCPU_FILTER.get() else {
        return;
    };
    if seccompiler::apply_filter(filter).is_err() {
        // A guest must not run unconfined; the controller sees the process end.
        sys::exit_now(libc::EXIT_FAILURE);
    }
}

fn equal(request: u64) -> Result<SeccompCondition, Error> {
    condition(SeccompCmpOp::Eq, request)
}

/// A condition on the request of an ioctl. The upper half of the register is ignored by the kernel.
fn condition(op: SeccompCmpOp, request: u64) -> Result<SeccompCondition, Error> {
    SeccompCondition::new(1, SeccompCmpArgLen::Dword, op, request).map_err(Error::Compile)
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, Error> {
    SeccompRule::new(conditions).map_err(Error::Compile)
}

/// Kills at what [`MAIN_THREAD`] lists and at every ioctl that is none of a vCPU's.
fn vcpu_filter() -> Result<BpfProgram, Error> {
    let other: Result<Vec<_>, _> = VCPU_IOCTLS
        .iter()
        .map(|request| condition(SeccompCmpOp::Ne, *request))
        .collect();
    compile(
        MAIN_THREAD,
        vec![rule(other?)?],
        SeccompAction::KillProcess,
        SeccompAction::Allow,
    )
}

fn compile(
    calls: &[i64],
    ioctls: Vec<SeccompRule>,
    listed: SeccompAction,
    others: SeccompAction,
) -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_ioctl, ioctls);
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64);
    filter.and_then(TryInto::try_into).map_err(Error::Compile)
}

#[cfg(test)]
mod tests;
