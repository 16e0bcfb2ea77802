//! A process's own clock in a simulation: the true time, offset and running a little fast or slow.
//!
//! Invariants:
//! - A clock never goes back.
//! - `true_time(local(t)) >= t`: a timer set from a local deadline never fires before that deadline.

use crate::clock::Time;

/// Parts per million.
const MILLION: i128 = 1_000_000;

/// A clock with a constant drift.
#[derive(Clone, Copy, Debug)]
pub struct SimClock {
    offset_ns: u64,
    drift_ppm: i32,
}

impl SimClock {
    /// A clock that shows `offset_ns` at true time 0 and gains `drift_ppm` microseconds per second
    /// (negative: loses). Panics beyond 100,000 ppm (10 %).
    pub fn new(offset_ns: u64, drift_ppm: i32) -> Self {
        assert!(drift_ppm.abs() <= 100_000, "a clock is not that wrong");
        Self {
            offset_ns,
            drift_ppm,
        }
    }

    /// What the clock shows at a true time.
    pub fn local(self, truth: Time) -> Time {
        let gained = i128::from(truth.0) * (MILLION + i128::from(self.drift_ppm)) / MILLION;
        Time(self.offset_ns + gained as u64)
    }

    /// The earliest true time at which the clock shows at least `local`.
    pub fn true_time(self, local: Time) -> Time {
        let target = i128::from(local.0.saturating_sub(self.offset_ns));
        let rate = MILLION + i128::from(self.drift_ppm);
        let truth = (target * MILLION + rate - 1).div_euclid(rate);
        Time(u64::try_from(truth).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_in_local_time_is_reached_exactly_and_not_before() {
        for drift in [-300, -1, 0, 1, 250, 50_000] {
            let clock = SimClock::new(5_000, drift);
            for local in [5_000, 5_001, 1_000_000, 2_000_000_000_123] {
                let truth = clock.true_time(Time(local));
                assert!(
                    clock.local(truth) >= Time(local),
                    "drift {drift} local {local}"
                );
                if truth.0 > 0 {
                    assert!(
                        clock.local(Time(truth.0 - 1)) < Time(local),
                        "{drift} {local}"
                    );
                }
            }
        }
    }
}
