//! Every copy sees another identifier, and hears of it.

use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::boot::layout;
use crate::bus::CountingIrq;

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

fn seen(memory: &GuestMemoryMmap) -> [u8; 16] {
    memory
        .read_obj::<[u8; 16]>(GuestAddress(layout::GENERATION.base))
        .unwrap()
}

#[test]
fn a_copy_has_another_identifier_and_is_told() {
    let (memory, irq) = (memory(), Arc::new(CountingIrq::default()));
    let parent = Generation::new(memory.clone(), irq.clone()).unwrap();
    assert_eq!(seen(&memory), parent.current());
    assert_eq!(irq.count(), 0, "a fresh machine is not told of a change");

    let mut copy = Generation::restore(&parent.save(), memory.clone(), irq.clone());
    assert_eq!(copy.current(), parent.current());
    copy.renew().unwrap();
    assert_ne!(copy.current(), parent.current());
    assert_eq!(seen(&memory), copy.current());
    assert_eq!(irq.count(), 1);
}

#[test]
fn memory_without_the_page_is_an_error() {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap());
    assert!(Generation::new(memory, Arc::new(CountingIrq::default())).is_err());
}
