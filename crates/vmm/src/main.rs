//! forkd-vmm: the built-in KVM machine monitor and template process.

fn main() {}
