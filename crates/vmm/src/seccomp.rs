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
//!
//! No call acts on another process, not even on one of the same user: vCPUs are interrupted by timers,
//! which reach threads of their own process only, instead of by `tgkill`. So forks of a branch that is
//! not written yet, which share its sandbox's user, are apart all the same.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
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
    libc::SYS_rt_sigaction,
    libc::SYS_seccomp,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_waitid,
];

/// What may be done to a descriptor. Not its flags: siblings share the disks', and one that asked for
/// direct access would break every other's reads. Not its owner and signal either: they reach any
/// process of the same user.
const FCNTLS: [i32; 4] = [
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
];
/// What a process may change about itself. Scheduling together with another process is left out.
const PRCTLS: [i32; 4] = [
    libc::PR_SET_NAME,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_PDEATHSIG,
    libc::PR_SET_DUMPABLE,
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
    let main = main_filter()?;
    _ = VCPU_FILTER.set(vcpu_filter());
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

/// The register that says what a call is to do.
#[derive(Debug, Clone, Copy)]
enum Argument {
    First = 0,
    Second = 1,
}

/// One rule for each value that the argument may have.
fn one_of(argument: Argument, values: &[u64]) -> Result<Vec<SeccompRule>, Error> {
    let values = values.iter();
    values
        .map(|value| rule(vec![condition(argument, SeccompCmpOp::Eq, *value)?]))
        .collect()
}

/// A condition on an argument. The kernel ignores the upper half of these registers.
fn condition(argument: Argument, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    SeccompCondition::new(argument as u8, SeccompCmpArgLen::Dword, op, value)
        .map_err(Error::Compile)
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, Error> {
    SeccompRule::new(conditions).map_err(Error::Compile)
}

/// Allows what the lists above name, and kills at everything else.
fn main_filter() -> Result<BpfProgram, Error> {
    let kvm = condition(
        Argument::Second,
        SeccompCmpOp::MaskedEq(TYPE_MASK),
        KVM_TYPE,
    )?;
    let mut ioctls = one_of(
        Argument::Second,
        &[PAGEMAP_SCAN, FIONBIO, TUNSETVNETHDRSZ, TUNSETOFFLOAD],
    )?;
    ioctls.push(rule(vec![kvm])?);
    let numbers = |values: [i32; 4]| values.map(|value| value as u64);
    compile(
        &[EVERY_THREAD, MAIN_THREAD].concat(),
        vec![
            (libc::SYS_ioctl, ioctls),
            (libc::SYS_fcntl, one_of(Argument::Second, &numbers(FCNTLS))?),
            (libc::SYS_prctl, one_of(Argument::First, &numbers(PRCTLS))?),
        ],
    )
}

/// Kills at what only the main thread does and at every ioctl that is none of a vCPU's.
///
/// Written out, because each instruction costs every fork about a microsecond: a jump for each number, no more.
/// The architecture is the first filter's to check.
fn vcpu_filter() -> BpfProgram {
    let forbidden = [MAIN_THREAD, &[libc::SYS_prctl]].concat();
    let mut program = vec![load(CALL)];
    let ioctls = one_of_these(
        &VCPU_IOCTLS,
        SeccompAction::Allow,
        SeccompAction::KillProcess,
    );
    program.push(jump_if_equal(libc::SYS_ioctl as u64, 0, ioctls.len() + 1));
    program.push(load(SECOND_ARGUMENT));
    program.extend(ioctls);
    let forbidden: Vec<u64> = forbidden.into_iter().map(|call| call as u64).collect();
    program.extend(one_of_these(
        &forbidden,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
    ));
    program
}

/// Where `struct seccomp_data` (seccomp(2)) keeps the call's number.
const CALL: u32 = 0;
/// Where it keeps the lower half of the second argument; the kernel ignores the upper one of an ioctl's request.
const SECOND_ARGUMENT: u32 = 24;

/// Answers `listed` if what was loaded is one of `values`, else `other`.
fn one_of_these(values: &[u64], listed: SeccompAction, other: SeccompAction) -> BpfProgram {
    let jumps = (0..).zip(values);
    let mut program: BpfProgram = jumps
        .map(|(before, value)| jump_if_equal(*value, values.len() - before, 0))
        .collect();
    program.extend([answer(other), answer(listed)]);
    program
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

/// Skips `equal` instructions or `unequal` ones. What is loaded has 32 bits, and so have all values here.
fn jump_if_equal(value: u64, equal: usize, unequal: usize) -> sock_filter {
    let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    instruction(code, value as u32, equal, unequal)
}

fn answer(action: SeccompAction) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, action.into(), 0, 0)
}

fn instruction(code: u32, k: u32, jt: usize, jf: usize) -> sock_filter {
    let jump = |by| u8::try_from(by).expect("the lists are shorter than a jump");
    sock_filter {
        code: code as u16,
        jt: jump(jt),
        jf: jump(jf),
        k,
    }
}

fn compile(calls: &[i64], chosen: Vec<(i64, Vec<SeccompRule>)>) -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls.iter().map(|call| (*call, Vec::new())).collect();
    rules.extend(chosen);
    let (others, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64);
    filter.and_then(TryInto::try_into).map_err(Error::Compile)
}

#[cfg(test)]
mod tests;
