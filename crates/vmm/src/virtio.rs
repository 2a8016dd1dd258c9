//! The virtio-mmio transport and checked queues, shared by every virtio device.
