//! The throttle of a pull: a token bucket that may go into debt by one transfer.

use std::time::Duration;

use ashlar_platform::clock::Time;

/// The bucket holds what may be transferred in this time.
const BURST: Duration = Duration::from_millis(100);

/// Bytes that a pull may still transfer.
pub struct Budget {
    /// 0: no limit.
    bytes_per_second: u64,
    available: i64,
    updated: Time,
}

impl Budget {
    /// A full bucket; 0 for no limit.
    pub fn new(bytes_per_second: u64, now: Time) -> Self {
        let mut budget = Self {
            bytes_per_second,
            available: 0,
            updated: now,
        };
        budget.available = budget.burst();
        budget
    }

    fn burst(&self) -> i64 {
        let bytes = u128::from(self.bytes_per_second) * BURST.as_millis() / 1000;
        i64::try_from(bytes).unwrap_or(i64::MAX).max(1)
    }

    fn refill(&mut self, now: Time) {
        let passed = now.since(self.updated).as_nanos();
        let gained = u128::from(self.bytes_per_second) * passed / 1_000_000_000;
        if gained == 0 {
            return;
        }
        self.updated = now;
        let gained = i64::try_from(gained).unwrap_or(i64::MAX);
        self.available = self.available.saturating_add(gained).min(self.burst());
    }

    /// Whether a transfer may start now; it is charged in full, into debt if need be.
    pub fn take(&mut self, bytes: usize, now: Time) -> bool {
        if self.bytes_per_second == 0 {
            return true;
        }
        self.refill(now);
        if self.available <= 0 {
            return false;
        }
        self.available = self
            .available
            .saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        true
    }

    /// When the next transfer may start; `None` if at once.
    pub fn ready_at(&self) -> Option<Time> {
        if self.bytes_per_second == 0 || self.available > 0 {
            return None;
        }
        let debt = u128::from(self.available.unsigned_abs()) + 1;
        let nanos = debt * 1_000_000_000 / u128::from(self.bytes_per_second) + 1;
        Some(self.updated.after(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time() {
        let mut now = Time(0);
        let mut budget = Budget::new(1_000_000, now);
        let mut sent = 0u64;
        while now < Time(10_000_000_000) {
            while budget.take(65_536, now) {
                sent += 65_536;
            }
            now = budget.ready_at().expect("in debt");
        }
        assert!((9_900_000..10_300_000).contains(&sent), "{sent}");
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut budget = Budget::new(0, Time(5));
        assert!(budget.take(usize::MAX, Time(5)));
        assert_eq!(budget.ready_at(), None);
    }
}
