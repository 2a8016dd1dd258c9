//! See `forkd_vmm::fuzz::queues`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkd_vmm::fuzz::queues(data));
