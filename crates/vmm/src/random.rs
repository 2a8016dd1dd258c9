//! Random bytes from the kernel.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `bytes`. Waits, at the host's start-up, until the kernel has gathered enough entropy.
///
/// By the system call itself: a library that looks for the C library's function finds none in a program that is
/// linked statically, and opens /dev/random instead, which the filter of system calls answers by ending the sandbox.
pub fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            // More than 256 bytes may come in parts (getrandom(2)).
            Ok(filled) => bytes = &mut bytes[filled..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_is_filled() {
        for len in [0, 1, 16, 4096, 1 << 20] {
            // A byte that stays zero in all of 32 fillings is not filled.
            let mut seen = vec![0u8; len];
            for _ in 0..32 {
                let mut bytes = vec![0u8; len];
                super::fill(&mut bytes).unwrap();
                seen.iter_mut()
                    .zip(bytes)
                    .for_each(|(seen, byte)| *seen |= byte);
            }
            assert!(seen.iter().all(|seen| *seen != 0), "{len}");
        }
    }
}
