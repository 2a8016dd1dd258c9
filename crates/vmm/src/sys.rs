//! The system calls that neither rustix nor the rust-vmm crates offer, one small safe function each.

#![allow(
    unsafe_code,
    reason = "the crate's door to raw system calls; every block is argued"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// libc has this flag too, in a type that is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// The two ways out of [`fork`].
#[derive(Debug)]
pub enum Forked {
    /// This is the new process.
    Child,
    /// This is the old process; the descriptor refers to the new one.
    Parent {
        /// The new process.
        pid: u32,
        /// Refers to it even after its pid is reused.
        pidfd: OwnedFd,
    },
}

/// Whose child a new process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kin {
    /// Of the same parent as this process: the controller can wait for every VM, whoever forked it.
    Sibling,
    /// Of this process, and ended with it.
    Child,
}

/// Forks this process. With `cgroup` (an open cgroup v2 directory) the new process is born in that
/// group.
///
/// Only the calling thread exists in the child. The caller makes sure that other threads are parked
/// where they hold no lock that the child needs (the allocator's above all): templates have no other
/// threads, and a branch parks the vCPU threads in their gate first.
pub fn fork(kin: Kin, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    // SAFETY: clone_args is plain old data for which all zeroes is the documented "nothing asked".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    let mut pidfd: RawFd = -1;
    args.flags = libc::CLONE_PIDFD as u64;
    match kin {
        Kin::Sibling => args.flags |= libc::CLONE_PARENT as u64,
        Kin::Child => args.exit_signal = libc::SIGCHLD as u64,
    }
    args.pidfd = &raw mut pidfd as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    let size = size_of::<libc::clone_args>();
    // SAFETY: `args` and `pidfd` live across the call and `size` is the size of `args`. Without
    // CLONE_VM and without a stack the call returns twice, as fork(2) does, each process on its own
    // copy of this stack, so no Rust value is aliased. glibc's bookkeeping is bypassed: its cached
    // thread id goes stale in the child, which only error-checking mutexes would notice.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            if kin == Kin::Child {
                // SAFETY: this prctl takes a number and touches no memory.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            }
            Ok(Forked::Child)
        }
        pid => {
            // SAFETY: the kernel has just stored a new descriptor there that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Forked::Parent {
                pid: pid as u32,
                pidfd,
            })
        }
    }
}

/// Takes ownership of a descriptor inherited by number, as named on the command line.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(F_SETFD) touches no memory; it fails for a number that is not open.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if set == -1 || number <= 2 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open, and the command line gives it to this program; each number is
    // taken once, before any other code of the program opens descriptors.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes every descriptor above the standard three except `keep`.
///
/// For a process that has just been forked: what the other process owns must not stay open here.
/// Values that still claim to own one of the closed descriptors must never be dropped afterwards.
pub fn close_all_except(keep: &mut Vec<RawFd>) {
    keep.retain(|fd| *fd > 2);
    keep.sort_unstable();
    keep.dedup();
    let mut first = 3u32;
    for fd in keep.iter().map(|fd| *fd as u32).chain([u32::MAX]) {
        if fd > first {
            let last = if fd == u32::MAX { u32::MAX } else { fd - 1 };
            // SAFETY: close_range touches no memory of this process. The caller owns the decision
            // that nothing else uses the closed descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = fd.saturating_add(1);
    }
}

/// Keeps glibc from giving each thread an allocation arena of its own: a sandbox has few threads and
/// every touched page of an arena counts a thousand times. Larger blocks get mappings of their own, so
/// that loading leaves no holes for the forks' small blocks to spread over.
pub fn one_malloc_arena() {
    // SAFETY: mallopt only sets parameters of the allocator; called before threads exist.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 8 << 10);
    }
}

/// Sizes that cover whatever is free in a heap: large ones in strides, small ones each, because the
/// allocator keeps small blocks by size. Descending, so that rests are found too.
fn every_size() -> impl Iterator<Item = usize> {
    let large = (11..=20).rev().map(|shift| 1 << shift);
    large.chain(
        (1..=HEAP_BLOCK_SMALL / 16)
            .rev()
            .map(|sixteens| sixteens * 16),
    )
}

/// Largest block that glibc's per-thread cache keeps.
const HEAP_BLOCK_SMALL: usize = 1032;

/// Takes all that is free in the heap out of circulation, for good: what is allocated from now on is
/// side by side in fresh pages.
///
/// A template's heap is shared by all its forks until they write to it. Loading leaves holes all over
/// it, and a fork that puts its few blocks into those holes copies every page of it. Costs the template
/// some ten pages once, and saves each of its forks as many.
pub fn retire_heap() {
    // SAFETY: sbrk(0) only tells where the heap ends.
    let end = unsafe { libc::sbrk(0) } as usize;
    for size in every_size() {
        loop {
            // SAFETY: malloc has no precondition; the block is freed below or never.
            let block = unsafe { libc::malloc(size) };
            if block.is_null() {
                break;
            }
            if (block as usize) < end {
                continue;
            }
            if size > HEAP_BLOCK_SMALL {
                // SAFETY: the block came from malloc above and nobody else knows it. A small one would
                // go to the cache of its size, and be a hole again: it is kept.
                unsafe { libc::free(block) };
            }
            break;
        }
    }
}

/// Interrupts one thread of this process, from any other of its threads. A timer, because the kernel
/// lets a timer signal threads of its own process only: unlike `tgkill` it need not be forbidden to
/// whoever takes the process over. A fork does not inherit it.
#[derive(Debug, Clone, Copy)]
pub struct Interrupt {
    timer: libc::c_int,
}

impl Interrupt {
    /// Prepares to send `signal` to the calling thread. EAGAIN where RLIMIT_SIGPENDING is reached.
    pub fn of_this_thread(signal: libc::c_int) -> io::Result<Interrupt> {
        // SAFETY: sigevent is plain old data, and all zeroes a valid value of it.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: gettid takes nothing and cannot fail.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::c_int = -1;
        let clock = libc::CLOCK_MONOTONIC;
        // SAFETY: both pointers are to live values of the types that the kernel expects; it writes an
        // int, whatever libc's timer_t is.
        let made = unsafe {
            libc::syscall(
                libc::SYS_timer_create,
                clock,
                &raw mut event,
                &raw mut timer,
            )
        };
        if made == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Interrupt { timer })
    }

    /// Interrupts the thread, soon; one that has ended hears nothing.
    pub fn fire(self) {
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let at_once = libc::itimerspec {
            it_interval: zero,
            it_value: libc::timespec { tv_nsec: 1, ..zero },
        };
        let none = std::ptr::null_mut::<libc::itimerspec>();
        // SAFETY: the new time lives across the call, and the old one is not asked for. The timer lives
        // as long as the process; the time is valid, so the call does not fail.
        unsafe {
            libc::syscall(
                libc::SYS_timer_settime,
                self.timer,
                0,
                &raw const at_once,
                none,
            )
        };
    }
}

/// Unmaps the pages of a mapping of code, given by its first address and its end. They come back from the program's
/// file as they are run.
pub fn forget_code(start: u64, end: u64) {
    let (start, len) = (start as *mut libc::c_void, (end - start) as usize);
    // SAFETY: the range is a private mapping of a file that nobody writes to, so what is read from it, and run, is the
    // same before and after. The kernel refuses ranges that it cannot do this to.
    unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) };
}

/// A thread of this process.
///
/// Not the standard library's: its alternate signal stack, handle and bookkeeping would cost every fork two
/// mappings and some pages.
#[derive(Debug)]
pub struct Thread(libc::pthread_t);

impl Thread {
    /// Starts a thread that does `body`, on a stack of its own. A panic in it ends the process. EAGAIN where a
    /// limit on processes or memory is reached.
    pub fn start(stack_bytes: usize, body: Box<dyn FnOnce() + Send>) -> io::Result<Thread> {
        // Boxed again: a pointer to a closure of any kind is two words, the thread is given one.
        let argument = Box::into_raw(Box::new(body));
        // SAFETY: pthread_attr_t is plain old data; it is initialised before any other use.
        let mut attributes: libc::pthread_attr_t = unsafe { std::mem::zeroed() };
        let mut thread: libc::pthread_t = 0;
        // SAFETY: `attributes` and `thread` are live values of the types expected. `argument` is a leaked box of
        // the type that `run` takes back, once; sending it is allowed, its closure is `Send` and `'static`.
        let failed = unsafe {
            libc::pthread_attr_init(&raw mut attributes);
            libc::pthread_attr_setstacksize(&raw mut attributes, stack_bytes);
            libc::pthread_create(
                &raw mut thread,
                &raw const attributes,
                run_thread,
                argument.cast(),
            )
        };
        if failed == 0 {
            return Ok(Thread(thread));
        }
        // SAFETY: no thread was started, so the box is still only here.
        drop(unsafe { Box::from_raw(argument) });
        Err(io::Error::from_raw_os_error(failed))
    }

    /// Waits until the thread has ended.
    pub fn join(self) {
        // SAFETY: the thread was started joinable by `start`, and is joined once: `self` is consumed.
        unsafe { libc::pthread_join(self.0, std::ptr::null_mut()) };
    }
}

extern "C" fn run_thread(argument: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: `Thread::start` leaked a box of this type for this thread alone.
    let body = unsafe { Box::from_raw(argument.cast::<Box<dyn FnOnce() + Send>>()) };
    body();
    std::ptr::null_mut()
}

/// Ends the process without running destructors: a VM's mappings and descriptors are the kernel's
/// to release.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes no pointers and does not return.
    unsafe { libc::_exit(code) }
}

/// Waits until at least one of `fds` is readable, or its other end gone; says which. A signal ends the
/// wait with none.
pub fn wait_readable(fds: &[RawFd]) -> Vec<bool> {
    let watch = |fd: &RawFd| libc::pollfd {
        fd: *fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polled: Vec<_> = fds.iter().map(watch).collect();
    // SAFETY: `polled` is an exclusively owned array of that many elements. Numbers that are no
    // descriptors are reported in `revents`.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
    polled.iter().map(|fd| fd.revents != 0).collect()
}

/// What `PAGEMAP_SCAN` reports: a run of pages `[start, end)` of one kind.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// The categories asked for that hold.
    pub categories: u64,
}

/// The page belongs to a file mapping (or shared memory), not to this process alone.
pub const PAGE_IS_FILE: u64 = 1 << 2;
/// The page is in memory.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// The page is swapped out.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The page is the shared page of zeroes.
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;

#[repr(C)]
#[derive(Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Finds pages of the process behind `pagemap` in `[start, end)` that are its own: copied on write
/// or anonymous, in memory or swapped out. Fills `regions` and returns how many were found and
/// where the walk stopped. Linux 6.7 or later; ENOTTY before.
pub fn own_pages(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    regions: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut args = ScanArgs {
        size: size_of::<ScanArgs>() as u64,
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..ScanArgs::default()
    };
    // SAFETY: `args` is the structure that this request number encodes the size of; `vec` and
    // `vec_len` describe the caller's exclusively borrowed slice of plain old data.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut args) };
    if found < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((found as usize, args.walk_end))
}

#[cfg(test)]
mod tests;
