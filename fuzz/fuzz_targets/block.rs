//! See `forkd_vmm::fuzz::block`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkd_vmm::fuzz::block(data));
