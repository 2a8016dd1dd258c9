//! Where connections come from: the virtio-serial port, vsock, and sockets of a test.

pub(crate) mod link;
pub(crate) mod port;
