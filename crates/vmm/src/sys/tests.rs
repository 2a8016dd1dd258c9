//! Each call with a wrong descriptor, and what can be seen of it in this process.

use std::fs::File;
use std::os::fd::AsFd;

use super::*;

#[test]
fn a_closed_number_is_not_inherited() {
    for number in [-1, 0, 2, 999_999] {
        assert_eq!(
            inherited_fd(number).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
    }
}

#[test]
fn forking_into_what_is_no_cgroup_fails() {
    let file = File::open("/dev/null").unwrap();
    assert!(fork(Kin::Sibling, Some(file.as_fd())).is_err());
}

#[test]
fn scanning_what_is_no_pagemap_fails() {
    let file = File::open("/dev/null").unwrap();
    assert!(own_pages(file.as_fd(), 0, 4096, &mut [PageRegion::default(); 4]).is_err());
}

#[test]
fn own_pages_are_told_from_untouched_and_file_pages() {
    let page = 4096usize;
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 * page as u64).unwrap();
    // SAFETY: a fresh private mapping of a file of that size.
    let base = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            16 * page,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
            &file,
            0,
        )
    }
    .unwrap()
    .cast::<u8>();
    // SAFETY: both addresses lie in the mapping.
    unsafe {
        base.add(3 * page).write_volatile(1);
        _ = base.add(5 * page).read_volatile();
    }
    let start = base as u64;
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let mut regions = [PageRegion::default(); 8];
    match own_pages(
        pagemap.as_fd(),
        start,
        start + 16 * page as u64,
        &mut regions,
    ) {
        Ok((found, _)) => {
            assert_eq!(found, 1);
            let expected = start + 3 * page as u64;
            assert_eq!(
                (regions[0].start, regions[0].end),
                (expected, expected + page as u64)
            );
        }
        Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => {
            println!("skipped: this kernel has no PAGEMAP_SCAN");
        }
        Err(e) => panic!("{e}"),
    }
}
