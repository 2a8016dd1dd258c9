//! Fills the guest's buffers with random bytes. It has no state of its own.

use std::io::Write as _;

use crate::random;
use crate::virtio::{Chain, Device, Queues, kind};

/// Most bytes given for one request; a guest that wants more asks again.
const REQUEST_MAX: usize = 4096;
const QUEUE_SIZES: &[u16] = &[64];

/// The device.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// Bytes written to the guest.
    fn fill(chain: Chain, queues: &Queues) -> u32 {
        let Ok(mut buffers) = chain.writer(queues.memory().as_ref()) else {
            return 0;
        };
        let mut bytes = [0; REQUEST_MAX];
        let bytes = &mut bytes[..buffers.available_bytes().min(REQUEST_MAX)];
        // An answer of zero bytes makes the guest ask again; weak bytes would be used.
        if random::fill(bytes).is_err() || buffers.write_all(bytes).is_err() {
            return 0;
        }
        u32::try_from(bytes.len()).unwrap_or(0)
    }
}

impl Device for Rng {
    fn kind(&self) -> u32 {
        kind::RNG
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn process(&mut self, queue: usize, queues: &mut Queues) {
        while let Some(chain) = queues.next(queue) {
            let head = chain.head_index();
            let written = Self::fill(chain, queues);
            queues.push(queue, head, written);
        }
    }
}
