//! What each sandbox computes, and what it must come to.
//!
//! Sandbox `i` sums the squares of 1..=k with k = 1000 (i + 1). The host knows the sum in closed form, so
//! a right answer shows that this fork, with the interpreter it inherited, did this work.

/// Numbers per step of the index; the largest sum, of a thousand sandboxes, fits 64 bits.
const STEP: u64 = 1000;

fn top(index: u32) -> u64 {
    STEP * (u64::from(index) + 1)
}

/// Python code. It names numpy without importing it.
pub(super) fn code(index: u32) -> String {
    format!(
        "int((numpy.arange(1, {} + 1, dtype=numpy.int64) ** 2).sum())",
        top(index)
    )
}

/// What the code must come to.
pub(super) fn expected(index: u32) -> String {
    let k = u128::from(top(index));
    (k * (k + 1) * (2 * k + 1) / 6).to_string()
}

/// The task in words.
pub(super) fn words(index: u32) -> String {
    format!("sum of squares to {}", top(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closed_form_is_the_sum() {
        let sum: u64 = (1..=1000u64).map(|k| k * k).sum();
        assert_eq!(expected(0), sum.to_string());
        let sum: u64 = (1..=7000u64).map(|k| k * k).sum();
        assert_eq!(expected(6), sum.to_string());
        assert!(expected(999).parse::<i64>().is_ok());
    }

    #[test]
    fn every_sandbox_computes_something_else() {
        let mut all: Vec<String> = (0..1000).map(expected).collect();
        all.dedup();
        assert_eq!(all.len(), 1000);
        assert!(code(1).contains("2000") && !code(1).contains("import"));
    }
}
