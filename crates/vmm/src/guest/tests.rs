//! What can be checked of the guest without running it.

use super::*;

#[test]
fn the_program_stays_clear_of_its_data() {
    let end = LOAD_ADDRESS + program().len() as u64;
    assert!(end <= u64::from(COUNTER), "{end:#x}");
}

#[test]
fn the_sum_depends_on_order() {
    assert_eq!(sum([1, 2]), 4);
    assert_eq!(sum([2, 1]), 5);
}
