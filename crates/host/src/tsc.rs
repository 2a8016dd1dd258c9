//! The rate of the processor's time-stamp counter. Software emulation hands the counter through to the
//! guest, whose kernel can be told the rate instead of measuring it against emulated timers.

use std::time::{Duration, Instant};

/// Shorter measurements are less exact than 20 ppm.
const MEASURE: Duration = Duration::from_millis(80);

/// A measurement that has begun.
#[derive(Debug)]
pub struct Measurement {
    began: Instant,
    #[cfg(target_arch = "x86_64")]
    counter: u64,
}

impl Measurement {
    /// Begins to measure.
    pub fn begin() -> Measurement {
        Measurement {
            began: Instant::now(),
            #[cfg(target_arch = "x86_64")]
            counter: crate::sys::time_stamp(),
        }
    }

    /// How much longer to wait for an exact answer.
    pub fn remaining(&self) -> Duration {
        MEASURE.saturating_sub(self.began.elapsed())
    }

    /// The rate in kHz since the measurement began; `None` where the processor has no such counter, or
    /// it ran backwards.
    pub fn khz(&self) -> Option<u64> {
        #[cfg(target_arch = "x86_64")]
        {
            let counted = crate::sys::time_stamp().checked_sub(self.counter)?;
            let elapsed = self.began.elapsed().as_nanos();
            let khz = u128::from(counted) * 1_000_000 / elapsed.max(1);
            u64::try_from(khz).ok().filter(|khz| *khz > 0)
        }
        #[cfg(not(target_arch = "x86_64"))]
        None
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let measure = || {
            let measurement = Measurement::begin();
            std::thread::sleep(measurement.remaining());
            measurement.khz().unwrap()
        };
        let (a, b) = (measure(), measure());
        assert!(a.abs_diff(b) < a / 1000, "{a} kHz, then {b} kHz");
    }
}
