//! builds what a guest boots: kernel, initramfs, read-only root
