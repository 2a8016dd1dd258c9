//! vCPU threads: running the guest, and standing still at a known point.
//!
//! ```text
//!   main thread                          vCPU thread
//!   gate.close(); kick ───────timer────► KVM_RUN returns EINTR
//!                                        KVM_RUN once more with immediate_exit: finishes the
//!                                        access that was in flight, enters no guest code
//!   wait for all   ◄─────parked───────── holds no lock, waits at the gate
//!   save, fork, …
//!   gate.open()    ─────────────────────► runs on
//! ```

#![allow(
    unsafe_code,
    reason = "one byte of the shared run page is written from another thread"
)]

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_xsave};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal;

use forkd_wire::vmm::Exit;

use crate::bus::{Bus, lock};
use crate::exit::ExitEvent;
use crate::kvm;
use crate::sys::{Interrupt, Thread};

/// Offset of the kick signal from SIGRTMIN.
const KICK: i32 = 0;
/// A vCPU thread handles exits and nothing else; its own frames are small.
const STACK_BYTES: usize = 128 * 1024;

/// A vCPU: its descriptor, and the byte by which another thread keeps it out of the guest.
pub struct Vcpu {
    /// Taken and dropped when a branch sheds KVM.
    fd: Mutex<Option<VcpuFd>>,
    immediate_exit: NonNull<AtomicU8>,
    /// Of the thread that runs it, once that runs.
    interrupt: OnceLock<Interrupt>,
}

// SAFETY: `immediate_exit` points into the run page, which stays mapped as long as `fd` holds the
// vCPU; the only access is an atomic store of one byte, and `fd` is still there at every `kick` by its
// being called only by the machine that owns both.
unsafe impl Send for Vcpu {}
// SAFETY: as above: atomic access through a shared reference.
unsafe impl Sync for Vcpu {}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Vcpu")
    }
}

impl Vcpu {
    /// Wraps a new vCPU.
    pub fn new(mut fd: VcpuFd) -> Vcpu {
        let byte = &raw mut fd.get_kvm_run().immediate_exit;
        // SAFETY: the run page is mapped, so the address is not null; AtomicU8 has the layout of u8.
        let immediate_exit = unsafe { NonNull::new_unchecked(byte.cast::<AtomicU8>()) };
        Vcpu {
            fd: Mutex::new(Some(fd)),
            immediate_exit,
            interrupt: OnceLock::new(),
        }
    }

    /// The descriptor, for a caller that knows the vCPU to be parked or not yet started.
    pub fn with_fd<T>(&self, f: impl FnOnce(&VcpuFd) -> T) -> T {
        f(lock(&self.fd)
            .as_ref()
            .expect("only a branch sheds the vCPU, and then forgets it"))
    }

    /// Unmaps and closes the vCPU in a process that has been forked off.
    pub fn shed(&self) {
        drop(lock(&self.fd).take());
    }

    /// Says that this thread is the one that runs it.
    fn taken(&self) -> std::io::Result<()> {
        let interrupt = Interrupt::of_this_thread(signal::SIGRTMIN() + KICK)?;
        _ = self.interrupt.set(interrupt);
        // See `kick`.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Brings its thread out of the guest. A thread that has not taken it yet looks at the gate before
    /// it enters the guest.
    fn kick(&self) {
        // SAFETY: see the `Send` argument; the kernel reads the byte, atomically by nature.
        unsafe { self.immediate_exit.as_ref() }.store(1, Ordering::SeqCst);
        // Together with the gate's own: either this sees the thread, or the thread the closed gate.
        fence(Ordering::SeqCst);
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.fire();
        }
    }
}

/// Restores the floating-point and vector state.
pub fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm::Error> {
    // SAFETY: the kernel reads 4096 bytes unless the process has been granted larger dynamic states
    // (AMX), which this program never requests; `kvm_xsave` has 4096 bytes.
    unsafe { fd.set_xsave(xsave) }.map_err(kvm::failed("restore the vector state"))
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    parked: usize,
}

/// Where vCPU threads wait while the machine stands still.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    /// Copy of `closed` for the run loop.
    closed: AtomicBool,
    moved: Condvar,
    opened: Condvar,
}

impl Gate {
    /// A gate that is closed from the start: vCPUs wait before their first instruction.
    pub fn new_closed() -> Gate {
        let gate = Gate::default();
        gate.close();
        gate
    }

    fn close(&self) {
        lock(&self.state).closed = true;
        self.closed.store(true, Ordering::SeqCst);
    }

    fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        lock(&self.state).closed = false;
        self.opened.notify_all();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn park(&self) {
        let mut state = lock(&self.state);
        state.parked += 1;
        self.moved.notify_one();
        while state.closed {
            state = wait(&self.opened, state);
        }
        state.parked -= 1;
    }

    fn wait_for(&self, count: usize) {
        let mut state = lock(&self.state);
        while state.parked < count {
            state = wait(&self.moved, state);
        }
    }
}

/// Waits on a condition; a panicked thread changes nothing about what is waited for.
pub(crate) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition
        .wait(guard)
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Something that may hold a vCPU thread in a device access and must let go before a pause.
pub trait Wakeup: Send + Sync + fmt::Debug {
    /// Lets every waiting access return.
    fn wake(&self);
}

/// What the vCPU threads share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Port devices.
    pub pio: Arc<Bus>,
    /// Memory-mapped devices.
    pub mmio: Arc<Bus>,
    /// Where to wait.
    pub gate: Arc<Gate>,
    /// How the machine ends.
    pub exit: ExitEvent,
}

/// The threads of one machine.
#[derive(Debug)]
pub struct Threads {
    vcpus: Vec<Arc<Vcpu>>,
    gate: Arc<Gate>,
    wakeups: Vec<Arc<dyn Wakeup>>,
}

/// A thread could not be started.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot start the thread of vCPU {vcpu}: raise the limit on processes (pids.max, ulimit -u)"
)]
pub struct Error {
    /// Which.
    vcpu: usize,
    /// The kernel's reason.
    #[source]
    source: std::io::Error,
}

/// Makes the kick signal interrupt system calls instead of ending the process. Once per program; a
/// fork inherits it.
pub fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    signal::register_signal_handler(signal::SIGRTMIN() + KICK, nothing)
}

impl Threads {
    /// Starts one thread for each vCPU. `confine` runs first in each thread.
    pub fn start(
        vcpus: Vec<Arc<Vcpu>>,
        shared: &Shared,
        wakeups: Vec<Arc<dyn Wakeup>>,
        confine: fn(),
    ) -> Result<Threads, Error> {
        for (number, vcpu) in vcpus.iter().enumerate() {
            let (vcpu, shared) = (vcpu.clone(), shared.clone());
            let body = move || {
                if let Err(error) = vcpu.taken() {
                    shared.exit.end(Exit::Internal, cannot_be_paused(&error));
                    return stay(&shared);
                }
                confine();
                run(&vcpu, &shared);
            };
            let failed = |source| Error {
                vcpu: number,
                source,
            };
            // It never ends before the process does.
            Thread::start(STACK_BYTES, Box::new(body)).map_err(failed)?;
        }
        Ok(Threads {
            vcpus,
            gate: shared.gate.clone(),
            wakeups,
        })
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    /// Brings every vCPU to rest at the gate. Returns when all stand still.
    pub fn park(&self) {
        self.gate.close();
        self.vcpus.iter().for_each(|vcpu| vcpu.kick());
        self.wakeups.iter().for_each(|wakeup| wakeup.wake());
        self.gate.wait_for(self.vcpus.len());
    }

    /// Lets the vCPUs run.
    pub fn unpark(&self) {
        self.gate.open();
    }

    /// In a process that has been forked off: closes the vCPUs. The threads do not exist here.
    pub fn shed(self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.shed());
    }
}

fn cannot_be_paused(error: &std::io::Error) -> String {
    format!(
        "cannot prepare to pause a vCPU: {error}: raise the limit on pending signals (ulimit -i)"
    )
}

/// Starts and ends as many threads as a machine has vCPUs, in a process that is going to be forked: the C library
/// keeps their stacks, mapped and guarded, for the threads of the forks, and has looked up what it needs.
pub fn rehearse_threads(count: usize) {
    let all_at_once = Arc::new(Mutex::new(()));
    let held = lock(&all_at_once);
    let start = |_| {
        let all_at_once = all_at_once.clone();
        let body = move || drop(lock(&all_at_once));
        // A fork that finds no stack makes one.
        Thread::start(STACK_BYTES, Box::new(body)).ok()
    };
    let threads: Vec<_> = (0..count).filter_map(start).collect();
    drop(held);
    threads.into_iter().for_each(Thread::join);
}

/// What became of one stay in the guest.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// An access was handled; the guest may go on.
    Handled,
    /// KVM_RUN was interrupted, or told not to enter.
    Interrupted,
    /// The machine is over.
    Over,
}

fn run(vcpu: &Vcpu, shared: &Shared) {
    loop {
        if shared.gate.is_closed() {
            settle(vcpu, shared);
            shared.gate.park();
            continue;
        }
        let mut slot = lock(&vcpu.fd);
        let Some(fd) = slot.as_mut() else { return };
        match enter(fd, shared) {
            Step::Handled => {}
            // The kick may have found the thread at the gate already. The top of the loop looks at
            // the gate again, so no kick is lost by lowering the flag here.
            Step::Interrupted => fd.set_kvm_immediate_exit(0),
            Step::Over => {
                drop(slot);
                return stay(shared);
            }
        }
    }
}

/// The machine is over: the main thread has been told and ends the process. Until then the thread
/// stays at the gate, so that a pause already under way does not wait for it in vain.
fn stay(shared: &Shared) {
    loop {
        shared.gate.close();
        shared.gate.park();
    }
}

/// Finishes the port or MMIO access that was in flight, without entering the guest.
fn settle(vcpu: &Vcpu, shared: &Shared) {
    if let Some(fd) = lock(&vcpu.fd).as_mut() {
        fd.set_kvm_immediate_exit(1);
        // An access that straddles two pages leaves once for each.
        while enter(fd, shared) == Step::Handled {}
        fd.set_kvm_immediate_exit(0);
    }
}

fn enter(fd: &mut VcpuFd, shared: &Shared) -> Step {
    let (exit, message) = match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            shared.pio.read(u64::from(port), data);
            return Step::Handled;
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            shared.pio.write(u64::from(port), data);
            return Step::Handled;
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            shared.mmio.read(address, data);
            return Step::Handled;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            shared.mmio.write(address, data);
            return Step::Handled;
        }
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Step::Interrupted,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => (Exit::PowerOff, String::new()),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => (Exit::Reset, String::new()),
        Ok(VcpuExit::Shutdown) => (
            Exit::Crash,
            "the guest's CPU shut down (triple fault)".into(),
        ),
        Ok(VcpuExit::InternalError) => {
            let message = "KVM cannot go on with what the guest's CPU did (internal error)";
            (Exit::Crash, message.to_owned())
        }
        Ok(VcpuExit::Hlt) => (Exit::PowerOff, "the guest halted for good".into()),
        Ok(other) => (Exit::Internal, format!("KVM left the guest with {other:?}")),
        Err(e) => (Exit::Internal, format!("KVM cannot run the guest: {e}")),
    };
    shared.exit.end(exit, message);
    Step::Over
}
