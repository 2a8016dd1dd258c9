//! Framing of a byte stream over a channel that never closes, such as a virtio-serial port.
