//! forkd-controller, the daemon of one node.

fn main() {}
