//! Slots made before any node runs, for those who want to: nodes take them instead of making their own.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc;

use forkd_host::chain;
use forkd_host::file::LockFile;
use tracing::warn;

use crate::address::MAX_SLOTS;
use crate::host::{self, Ways};
use crate::registry::Registry;
use crate::slot::Slot;
use crate::sweep::{self, BATCH, Error, Fate};

/// Held by whoever makes slots ahead or takes all away.
const LOCK: &str = "provision.lock";
/// More threads than this only wait for the kernel's one lock over all links.
const THREADS_MAX: usize = 8;

/// What was made ahead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Setup {
    /// The numbers of all slots that wait now.
    pub ready: Vec<u32>,
    /// Those of them that were made just now.
    pub made: Vec<u32>,
}

/// What was taken away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Teardown {
    /// What became of each slot.
    pub slots: Vec<(u32, Fate)>,
    /// Whether the host's rules are gone: they stay as long as a slot or a running node does.
    pub rules: bool,
}

/// Makes slots until `count` wait, and tells after each how many do. All or nothing: when one cannot be made, or
/// `told` says to stop by `false`, those made just now are removed; then the answer is `None`. Blocks.
pub fn setup(
    directory: &Path,
    count: u32,
    mut told: impl FnMut(usize) -> bool,
) -> Result<Option<Setup>, Error> {
    let registry = Registry::reserve(directory)?;
    let _lock = LockFile::acquire(&directory.join(LOCK)).map_err(crate::registry::Error::from)?;
    remove_unfinished(&registry)?;
    let ways = host::prepare().map_err(Error::Host)?;
    let mut setup = Setup {
        ready: registry.offered()?,
        made: vec![],
    };
    let missing = (count as usize).saturating_sub(setup.ready.len());
    let mut goes_on = told(setup.ready.len());
    if goes_on && missing > 0 {
        let making = Making::new(&registry, ways, missing);
        let made = making.all(|index| {
            setup.made.push(index);
            setup.ready.push(index);
            // Of those that come in after the end is not told again.
            goes_on = goes_on && told(setup.ready.len());
            goes_on
        });
        if let Err(e) = made {
            undo(&registry, &setup.made);
            return Err(e);
        }
    }
    if !goes_on {
        undo(&registry, &setup.made);
        return Ok(None);
    }
    setup.made.sort_unstable();
    setup.ready.sort_unstable();
    Ok(Some(setup))
}

/// Removes every slot of this host that no running node has and nobody uses, and the host's rules if none is left.
/// `told` hears of each, and ends it by `false`. With `pretend` nothing is done. Blocks.
pub fn teardown(
    directory: &Path,
    pretend: bool,
    mut told: impl FnMut(u32, &Fate) -> bool,
) -> Result<Teardown, Error> {
    let registry = Registry::reserve(directory)?;
    let _lock = LockFile::acquire(&directory.join(LOCK)).map_err(crate::registry::Error::from)?;
    let mut done = Teardown::default();
    let mut complete = true;
    sweep::everything(&registry, pretend, |index, fate| {
        complete = told(index, &fate);
        done.slots.push((index, fate));
        complete
    })?;
    if complete && !pretend {
        done.rules = sweep::rules_of_host(&registry)?;
    }
    Ok(done)
}

/// Slots being made by several threads. One alone would mostly wait, for `nft` and for the kernel.
#[derive(Debug)]
struct Making<'a> {
    registry: &'a Registry,
    ways: Ways,
    /// How many are still to be begun.
    missing: AtomicUsize,
    /// The next number to look at. Each is looked at once: to ask for those taken again and again would cost more with
    /// each slot.
    next: AtomicU32,
    ends: AtomicBool,
}

impl<'a> Making<'a> {
    fn new(registry: &'a Registry, ways: Ways, missing: usize) -> Self {
        Self {
            registry,
            ways,
            missing: AtomicUsize::new(missing),
            next: AtomicU32::new(0),
            ends: AtomicBool::new(false),
        }
    }

    /// Makes all that are missing, unless one fails or `made` says to stop. It hears of each that is made, also of those
    /// that were being made when another failed.
    fn all(&self, mut made: impl FnMut(u32) -> bool) -> Result<(), Error> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            let mut outcome = Ok(());
            for nth in 0..threads.min(THREADS_MAX) {
                let sender = sender.clone();
                let thread = std::thread::Builder::new().name("slots".to_owned());
                let started = thread.spawn_scoped(scope, || self.work(sender));
                if let (0, Err(e)) = (nth, started) {
                    // With fewer it takes longer, with none for ever.
                    outcome = Err(Error::Thread(e));
                }
            }
            drop(sender);
            for result in receiver {
                match result {
                    Ok(index) if made(index) => {}
                    Ok(_) => self.ends.store(true, Ordering::Relaxed),
                    Err(e) => {
                        self.ends.store(true, Ordering::Relaxed);
                        outcome = outcome.and(Err(e));
                    }
                }
            }
            outcome
        })
    }

    fn work(&self, sender: mpsc::Sender<Result<u32, Error>>) {
        let begin = |missing: usize| missing.checked_sub(1);
        while !self.ends.load(Ordering::Relaxed) {
            let begun = self
                .missing
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, begin);
            // Nobody listens any more only after a panic, which is reported where it happened.
            if begun.is_err() || sender.send(self.one()).is_err() {
                return;
            }
        }
    }

    /// Makes a slot of the next number that nobody has, and puts it into the reserve.
    fn one(&self) -> Result<u32, Error> {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= MAX_SLOTS {
                return Err(Error::Full);
            }
            if !self.registry.claim(index)? {
                continue;
            }
            match Slot::make_ready(index, self.ways) {
                Ok(()) => {
                    self.registry.offer(index)?;
                    return Ok(index);
                }
                Err(e) => {
                    self.registry.release(index)?;
                    if !e.is_taken() {
                        return Err(e.into());
                    }
                }
            }
        }
    }
}

/// What a setup that was killed left.
fn remove_unfinished(registry: &Registry) -> Result<(), Error> {
    let _moving = registry.moves()?;
    let offered: BTreeSet<u32> = registry.offered()?.into_iter().collect();
    let mut ours = registry.ours()?;
    ours.retain(|index| !offered.contains(index));
    sweep::all_gone(sweep::clear(registry, &ours))
}

/// Removes what was made just now, unless a node has taken it already.
fn undo(registry: &Registry, made: &[u32]) {
    for batch in made.chunks(BATCH) {
        let undone = || -> Result<Vec<(u32, Error)>, Error> {
            let _moving = registry.moves()?;
            let offered: BTreeSet<u32> = registry.offered()?.into_iter().collect();
            let mut batch = batch.to_vec();
            batch.retain(|index| offered.contains(index));
            Ok(sweep::clear(registry, &batch))
        };
        match undone() {
            Ok(left) => sweep::log(left),
            Err(e) => warn!(error = chain(&e), "network slots may have leaked"),
        }
    }
}
