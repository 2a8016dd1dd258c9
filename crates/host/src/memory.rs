//! The memory of this process.

use crate::sys;

/// Gives back to the system what the allocator keeps and nobody uses: in a long-lived process pages stay with it
/// after a burst, to be used again. Walks the whole heap, which takes some 25 ms where 90 MiB go back and may keep
/// threads waiting that allocate meanwhile. Does nothing where the C library is not glibc.
pub fn give_back() {
    sys::trim_heap();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    #[test]
    fn what_nobody_uses_is_given_back() {
        if cfg!(not(target_env = "gnu")) {
            println!("skipped: the C library is not glibc");
            return;
        }
        let resident = || process::memory(std::process::id()).unwrap().rss_kib;
        // Too small to be mapped on their own; the last one keeps the heap from shrinking by itself.
        let mut blocks: Vec<Vec<u8>> = (0..64 * 1024).map(|_| vec![1; 1024]).collect();
        let last = blocks.pop();
        let full = resident();
        drop(blocks);
        let kept = resident();
        give_back();
        let left = resident();
        assert!(kept > full - 8 * 1024, "{full} KiB, {kept} by itself");
        assert!(left < kept - 48 * 1024, "{kept} KiB, {left} left");
        assert_eq!(last.map(|block| block.len()), Some(1024));
    }
}
