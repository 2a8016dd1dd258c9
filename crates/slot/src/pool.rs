//! Slots made ahead, so that a fork need not wait for one.
//!
//! A thread of its own keeps `ready` slots waiting and removes what is given back. A slot is never used twice: its
//! namespace goes, and with it every connection, neighbour, route and rule that its guest left.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forkd_host::chain;
use ipnet::IpNet;
use tracing::warn;

use crate::address::MAX_SLOTS;
use crate::host::{self, Ways};
use crate::registry::{self, Registry};
use crate::slot::{self, Slot};
use crate::sweep::{self, BATCH};

#[cfg(test)]
mod tests;

/// After a slot could not be made, how long until the next try for somebody who waits.
const PAUSE: Duration = Duration::from_secs(1);
/// The same, when nobody waits.
const IDLE_PAUSE: Duration = Duration::from_secs(30);
/// How long after a slot was taken the next one may be expected: until then nothing is done that can wait.
const QUIET: Duration = Duration::from_millis(100);
/// For how long at most work is put off while slots are being taken.
const BURST_MAX: Duration = Duration::from_secs(1);
/// RTNL, the kernel's one lock over all links, lets no more than this pay off.
const THREADS: usize = 2;

/// How the pool is kept.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which numbers are this node's.
    pub registry: Registry,
    /// How many slots wait.
    pub ready: u32,
    /// How many slots there may be, waiting ones among them; at most [`MAX_SLOTS`].
    pub max: u32,
    /// Networks that the default policy refuses besides private ones: a cluster's.
    pub refused: Vec<IpNet>,
}

/// Why no slot is to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// All are in use.
    #[error(
        "all {max} network slots of this node are in use; kill sandboxes, or raise --slots (at most {MAX_SLOTS})"
    )]
    Exhausted {
        /// How many there are.
        max: u32,
    },
    /// None could be made in time.
    #[error("no network slot could be made: {0}")]
    Failed(String),
    /// The pool is closed.
    #[error("the node is closing")]
    Closed,
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A slot of an earlier run cannot be removed.
    #[error(transparent)]
    Slot(#[from] slot::Error),
    /// Numbers cannot be kept.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The host's rules cannot be taken away.
    #[error("the host's rules for sandboxes cannot be taken away")]
    Rules(#[source] forkd_host::net::nft::Error),
    /// The host has no way out for slots.
    #[error(transparent)]
    Host(host::Error),
    /// No thread can be started.
    #[error(
        "cannot start a thread that makes network slots; see pids.max of the control group, `ulimit -u` and \
         kernel.threads-max"
    )]
    Thread(#[source] std::io::Error),
    /// Every number is taken.
    #[error("all {MAX_SLOTS} network slots of this host are taken")]
    Full,
}

/// What the pool holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Prepared and waiting.
    pub ready: u32,
    /// Used by sandboxes.
    pub leased: u32,
    /// Being made or removed.
    pub busy: u32,
}

/// Prepared slots.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    /// What the host has, found out when the first slot is made.
    ways: OnceLock<Ways>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Slot>,
    leased: BTreeSet<u32>,
    making: BTreeSet<u32>,
    removing: VecDeque<u32>,
    being_removed: BTreeSet<u32>,
    /// Where the next free number is looked for: a number rests as long as possible before it is used again, because
    /// the host remembers connections by the address that follows from it.
    next: u32,
    /// Callers that wait for a slot.
    waiting: u32,
    burst: Option<Burst>,
    failed: Option<(Instant, String)>,
    closed: bool,
}

/// Slots that were taken one soon after the other.
#[derive(Debug, Clone, Copy)]
struct Burst {
    first: Instant,
    last: Instant,
}

enum Task {
    Make(u32),
    Remove(Vec<u32>),
}

impl Pool {
    /// Removes every slot of this node that `in_use` does not name, and those of nodes that are no more, and begins to
    /// fill.
    pub fn open(config: Config, in_use: &[u32]) -> Result<Self, OpenError> {
        let in_use: BTreeSet<u32> = in_use.iter().copied().collect();
        let mut left = config.registry.ours()?;
        left.retain(|index| !in_use.contains(index));
        sweep::all_gone(sweep::clear(&config.registry, &left))?;
        if let Err(e) = sweep::gone(&config.registry) {
            // They hinder nobody: other numbers are free.
            warn!(
                error = chain(&e),
                "slots of nodes that are no more are left"
            );
        }
        let state = State {
            leased: in_use,
            ..State::default()
        };
        let shared = Arc::new(Shared {
            config,
            ways: OnceLock::new(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let thread = |_| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("slots".to_owned())
                .spawn(move || shared.work())
        };
        let threads = (0..THREADS).filter_map(|n| thread(n).ok()).collect();
        Ok(Self {
            shared,
            threads: Mutex::new(threads),
        })
    }

    /// A slot with the default policy: at once if one is ready, else as soon as one is made. Blocks.
    pub fn lease(&self, patience: Duration) -> Result<Slot, Error> {
        let shared = &self.shared;
        let until = Instant::now() + patience;
        let mut state = shared.lock();
        state.waiting += 1;
        shared.changed.notify_all();
        let leased = loop {
            if state.closed {
                break Err(Error::Closed);
            }
            if let Some(slot) = state.ready.pop_front() {
                state.leased.insert(slot.index());
                state.taken(Instant::now());
                break Ok(slot);
            }
            if state.leased.len() >= shared.config.max as usize {
                break Err(Error::Exhausted {
                    max: shared.config.max,
                });
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = state.failed.as_ref().map(|(_, why)| why.clone());
                break Err(Error::Failed(
                    why.unwrap_or_else(|| "it took too long".to_owned()),
                ));
            }
            state = match shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        };
        state.waiting -= 1;
        drop(state);
        shared.changed.notify_all();
        leased
    }

    /// Makes one slot at once, for the first caller to come, or says why this host cannot.
    pub fn probe(&self) -> Result<(), OpenError> {
        loop {
            let mut state = self.shared.lock();
            let index = state.free_index();
            state.making.insert(index);
            drop(state);
            let made = self.shared.try_make(index);
            let mut state = self.shared.lock();
            state.making.remove(&index);
            if let Some(slot) = made? {
                state.ready.push_back(slot);
                drop(state);
                self.shared.changed.notify_all();
                return Ok(());
            }
        }
    }

    /// Gives a slot back, by its number: its guest must be gone.
    pub fn release(&self, index: u32) {
        let mut state = self.shared.lock();
        if state.leased.remove(&index) {
            state.removing.push_back(index);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// What it holds now.
    pub fn counts(&self) -> Counts {
        let state = self.shared.lock();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Counts {
            ready: count(state.ready.len()),
            leased: count(state.leased.len()),
            busy: count(state.making.len() + state.removing.len() + state.being_removed.len()),
        }
    }

    /// Ends the threads and removes the slots that nobody uses. Those in use stay, for the next pool. Idempotent.
    pub fn close(&self) {
        self.stop();
        let mut state = self.shared.lock();
        let waiting = std::mem::take(&mut state.ready);
        let mut indices = Vec::from(std::mem::take(&mut state.removing));
        drop(state);
        for slot in waiting {
            indices.push(slot.index());
            // The device goes with the namespace, many at a time; with its last file it would go alone. Where it cannot be
            // left, it has gone.
            let _ = slot.leave();
        }
        self.shared.remove(&indices);
    }

    fn stop(&self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(task) = self.next() {
            match task {
                Task::Make(index) => self.make(index),
                Task::Remove(indices) => {
                    self.remove(&indices);
                    let mut state = self.lock();
                    state.being_removed.retain(|index| !indices.contains(index));
                }
            }
            self.changed.notify_all();
        }
    }

    fn make(&self, index: u32) {
        let made = self.try_make(index);
        let mut state = self.lock();
        state.making.remove(&index);
        match made {
            Ok(Some(slot)) => {
                state.failed = None;
                state.ready.push_back(slot);
            }
            // Somebody else's number; the next one then.
            Ok(None) => {}
            Err(e) => {
                let why = chain(&e);
                warn!(slot = index, error = why, "no network slot made");
                state.failed = Some((Instant::now(), why));
            }
        }
    }

    /// A slot of this number, or another one that was made ahead. `None` when somebody else has the number.
    fn try_make(&self, index: u32) -> Result<Option<Slot>, OpenError> {
        let registry = &self.config.registry;
        // What is amiss is told by whoever prepares the host; until then there is one way at most.
        let ways = *self
            .ways
            .get_or_init(|| host::prepare().unwrap_or_default());
        while let Some(reserved) = registry.take_offered()? {
            match Slot::take_ready(reserved, &self.config.refused, ways) {
                Ok(Some(slot)) => return Ok(Some(slot)),
                Ok(None) => registry.release(reserved)?,
                Err(e) => {
                    warn!(
                        slot = reserved,
                        error = chain(&e),
                        "a slot that was made ahead is of no use"
                    );
                    self.remove(&[reserved]);
                }
            }
        }
        if !registry.claim(index)? {
            return Ok(None);
        }
        match Slot::make(index, &self.config.refused, ways) {
            Ok(slot) => Ok(Some(slot)),
            // Provisioned by hand, or by another program: not ours to use or to remove.
            Err(e) if e.is_taken() => {
                registry.release(index)?;
                Ok(None)
            }
            Err(e) => {
                registry.release(index)?;
                Err(e.into())
            }
        }
    }

    fn remove(&self, indices: &[u32]) {
        sweep::log(sweep::clear(&self.config.registry, indices));
    }

    /// Waits for something to do; `None` when the pool closes.
    fn next(&self) -> Option<Task> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let now = Instant::now();
            if let Some(task) = state.decide(&self.config, now) {
                return Some(task);
            }
            let pause = if state.in_burst(now) { QUIET } else { PAUSE };
            state = match self.changed.wait_timeout(state, pause) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl State {
    /// What to do next. Making comes first: somebody may wait for it.
    fn decide(&mut self, config: &Config, now: Instant) -> Option<Task> {
        let needed = self.waiting as usize > self.ready.len() + self.making.len();
        if !needed && self.in_burst(now) {
            return None;
        }
        let pause = if self.waiting > 0 { PAUSE } else { IDLE_PAUSE };
        let paused = self
            .failed
            .as_ref()
            .is_some_and(|(at, _)| now.duration_since(*at) < pause);
        let coming = self.ready.len() + self.making.len();
        let wanted = (config.ready + self.waiting) as usize;
        let all = coming + self.leased.len() + self.removing.len() + self.being_removed.len();
        if !paused && coming < wanted && all < config.max.min(MAX_SLOTS) as usize {
            let index = self.free_index();
            self.making.insert(index);
            return Some(Task::Make(index));
        }
        if self.removing.is_empty() {
            return None;
        }
        let several = self.removing.len().min(BATCH);
        let indices: Vec<u32> = self.removing.drain(..several).collect();
        self.being_removed.extend(&indices);
        Some(Task::Remove(indices))
    }

    /// A slot was taken.
    fn taken(&mut self, now: Instant) {
        let first = match self.burst {
            Some(burst) if now.duration_since(burst.last) < QUIET => burst.first,
            _ => now,
        };
        self.burst = Some(Burst { first, last: now });
    }

    /// Whether forks are being started right now: what is made or removed meanwhile takes processors, and the kernel's
    /// lock over links, from those very forks. Forks that come for long do not put it off for ever.
    fn in_burst(&self, now: Instant) -> bool {
        self.burst.is_some_and(|burst| {
            now.duration_since(burst.last) < QUIET && now.duration_since(burst.first) < BURST_MAX
        })
    }

    /// The next number that nobody has. There is one: fewer than [`MAX_SLOTS`] are taken.
    fn free_index(&mut self) -> u32 {
        loop {
            let index = self.next;
            self.next = (self.next + 1) % MAX_SLOTS;
            let taken = self.leased.contains(&index)
                || self.making.contains(&index)
                || self.being_removed.contains(&index)
                || self.removing.contains(&index)
                || self.ready.iter().any(|slot| slot.index() == index);
            if !taken {
                return index;
            }
        }
    }
}
