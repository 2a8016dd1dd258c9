//! forkd: the command line

fn main() {}
