//! Percentiles of small samples.

use serde::Serialize;

/// Median, 99th percentile and maximum of a sample, in the unit of its name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Default)]
pub(crate) struct Spread {
    /// Half of the sample is at most this.
    pub p50: f64,
    /// All but one in a hundred is at most this; the maximum in samples under a hundred.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// The spread of a sample; `None` for an empty one.
    pub(crate) fn of(sample: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = sample.iter().copied().filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let max = *sorted.last()?;
        Some(Self {
            p50: rank(&sorted, 50.0),
            p99: rank(&sorted, 99.0),
            max,
        })
    }

    /// The spread with every figure rounded to `digits` after the point.
    #[must_use]
    pub(crate) fn rounded(self, digits: u32) -> Self {
        Self {
            p50: round(self.p50, digits),
            p99: round(self.p99, digits),
            max: round(self.max, digits),
        }
    }
}

/// Nearest-rank percentile: always a value that was really measured.
fn rank(sorted: &[f64], percent: f64) -> f64 {
    let position = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted[position.clamp(1, sorted.len()) - 1]
}

/// Rounds to `digits` after the point.
pub(crate) fn round(value: f64, digits: u32) -> f64 {
    let scale = 10f64.powi(digits as i32);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sample: &[f64], expected: Option<(f64, f64, f64)>) {
        let found = Spread::of(sample).map(|s| (s.p50, s.p99, s.max));
        assert_eq!(found, expected, "{sample:?}");
    }

    #[test]
    fn percentiles_are_measured_values() {
        check(&[], None);
        check(&[7.0], Some((7.0, 7.0, 7.0)));
        check(&[2.0, 1.0], Some((1.0, 2.0, 2.0)));
        check(&[3.0, 1.0, 2.0], Some((2.0, 3.0, 3.0)));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        check(&hundred, Some((50.0, 99.0, 100.0)));
        let thousand: Vec<f64> = (1..=1000).map(f64::from).collect();
        check(&thousand, Some((500.0, 990.0, 1000.0)));
    }

    #[test]
    fn what_is_no_number_is_left_out() {
        check(&[f64::NAN, 4.0], Some((4.0, 4.0, 4.0)));
    }

    #[test]
    fn rounding_keeps_the_asked_digits() {
        assert_eq!(round(1.2345, 2), 1.23);
        assert_eq!(round(1.5, 0), 2.0);
    }
}
