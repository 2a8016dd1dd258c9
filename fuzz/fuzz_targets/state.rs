//! See `forkd_vmm::fuzz::state`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkd_vmm::fuzz::state(data));
