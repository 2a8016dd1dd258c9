//! The rings of one device, in guest memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// A request the driver made: a chain of buffers in guest memory.
pub type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// The rings of one device.
#[derive(Debug)]
pub struct Queues {
    pub(super) rings: Vec<Queue>,
    memory: Arc<GuestMemoryMmap>,
    /// Rings to which something was given back since the last look.
    touched: u32,
    /// Rings left with requests in them because the turn was over.
    postponed: u32,
    /// Requests that may still be taken in this turn.
    left: u32,
    broken: bool,
}

/// Layout of the ring of used requests: its header, and each element.
const USED_HEADER_LEN: u64 = 4;
const USED_ELEMENT_LEN: u64 = 8;

/// Most requests served in one turn. A guest that adds requests as fast as they are served must not
/// keep a thread from being paused.
const TURN: u32 = 1024;

impl Queues {
    pub(super) fn new(sizes: &[u16], memory: Arc<GuestMemoryMmap>) -> Self {
        let ring = |size: &u16| Queue::new(*size).expect("devices have sizes that are powers of 2");
        Self {
            rings: sizes.iter().map(ring).collect(),
            memory,
            touched: 0,
            postponed: 0,
            left: TURN,
            broken: false,
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Takes the next request of this turn from `queue`. When there is none, the driver will notify.
    pub fn next(&mut self, queue: usize) -> Option<Chain> {
        if self.left == 0 {
            self.postponed |= 1 << queue;
            return None;
        }
        self.left -= 1;
        if let Some(chain) = self.pop(queue) {
            return Some(chain);
        }
        // What came in before the driver knew that it has to notify is taken now.
        if self.listen(queue) {
            self.pop(queue)
        } else {
            None
        }
    }

    /// Begins a turn, and says which queues the last one left unfinished, as bits.
    pub(super) fn begin(&mut self) -> u32 {
        self.left = TURN;
        std::mem::take(&mut self.postponed)
    }

    pub(super) fn is_postponed(&self) -> bool {
        self.postponed != 0
    }

    /// Takes the next request from `queue`, whether or not the driver will notify.
    pub fn pop(&mut self, queue: usize) -> Option<Chain> {
        let ring = self.rings.get_mut(queue).filter(|ring| ring.ready())?;
        if self.broken {
            return None;
        }
        match ring.iter(Arc::clone(&self.memory)) {
            Ok(mut available) => available.next(),
            Err(_) => {
                self.broken = true;
                None
            }
        }
    }

    /// Puts the request taken last back, to be taken again.
    pub fn undo_pop(&mut self, queue: usize) {
        if let Some(ring) = self.rings.get_mut(queue) {
            ring.go_to_previous_position();
        }
    }

    /// Gives a request back to the driver, `written` bytes of its buffers filled.
    pub fn push(&mut self, queue: usize, head: u16, written: u32) {
        let Some(ring) = self.rings.get_mut(queue) else {
            return;
        };
        match ring.add_used(self.memory.as_ref(), head, written) {
            Ok(()) => self.touched |= 1 << queue,
            Err(_) => self.broken = true,
        }
    }

    /// Asks the driver to notify `queue` again. True when requests came in meanwhile.
    fn listen(&mut self, queue: usize) -> bool {
        if self.broken {
            return false;
        }
        let Some(ring) = self.rings.get_mut(queue).filter(|ring| ring.ready()) else {
            return false;
        };
        ring.enable_notification(self.memory.as_ref())
            .unwrap_or_else(|_| {
                self.broken = true;
                false
            })
    }

    /// Asks the driver to notify when it adds to `queue`, whatever waits there already. Answers a mark
    /// of what waits there: another one means that the driver has added something.
    pub fn listen_beyond(&mut self, queue: usize) -> Option<u16> {
        let mark = self.mark(queue)?;
        let ring = self.rings.get(queue)?;
        if ring.event_idx_enabled() {
            let at = ring.used_ring() + USED_HEADER_LEN + USED_ELEMENT_LEN * u64::from(ring.size());
            let stored = self
                .memory
                .store(mark.to_le(), GuestAddress(at), Ordering::SeqCst);
            self.broken |= stored.is_err();
        }
        // The driver may have added something before it could know.
        self.mark(queue)
    }

    /// A mark of what waits in `queue`, see [`Queues::listen_beyond`].
    pub fn mark(&mut self, queue: usize) -> Option<u16> {
        let ring = self
            .rings
            .get(queue)
            .filter(|ring| ring.ready() && !self.broken)?;
        ring.avail_idx(self.memory.as_ref(), Ordering::SeqCst)
            .ok()
            .map(|index| index.0)
    }

    /// Whether the driver made a ring unusable.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether `queue` was set up by the driver.
    pub fn is_ready(&self, queue: usize) -> bool {
        self.rings.get(queue).is_some_and(|ring| ring.ready())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    pub(super) fn wants_interrupt(&mut self) -> bool {
        let touched = std::mem::take(&mut self.touched);
        let mut wanted = false;
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if touched & (1 << index) != 0 {
                match ring.needs_notification(self.memory.as_ref()) {
                    Ok(needed) => wanted |= needed,
                    Err(_) => self.broken = true,
                }
            }
        }
        wanted
    }

    /// Checks every ring the driver made ready.
    pub(super) fn check(&mut self, event_index: bool) {
        for ring in &mut self.rings {
            ring.set_event_idx(event_index);
            if ring.ready() && !ring.is_valid(self.memory.as_ref()) {
                self.broken = true;
            }
        }
    }

    pub(super) fn reset(&mut self) {
        for ring in &mut self.rings {
            ring.reset();
        }
        (self.touched, self.postponed, self.broken) = (0, 0, false);
    }
}
