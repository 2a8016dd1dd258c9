//! The daemon as a program, on a loopback port.
