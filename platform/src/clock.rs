//! Time as the engines see it: nanoseconds of CLOCK_BOOTTIME, which also advances while the machine
//! sleeps (leases depend on it) and never goes back.
#![expect(unsafe_code, reason = "clock_gettime through libc")]

use std::time::Duration;

/// A point in time, in nanoseconds since boot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Time(pub u64);

impl Time {
    /// This time plus a duration.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// Time passed since `earlier`; zero if that is in the future.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// The time now (about 20 ns: the kernel's vDSO answers).
#[must_use]
pub fn now() -> Time {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec for the duration of the call, which only writes to it.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    // CLOCK_BOOTTIME exists since Linux 2.6.39; the call cannot fail with a valid pointer.
    assert_eq!(result, 0, "CLOCK_BOOTTIME is missing: this needs Linux");
    Time(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_advances_and_never_goes_back() {
        let start = now();
        let mut last = start;
        while last == start {
            let next = now();
            assert!(next >= last);
            last = next;
        }
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Time(u64::MAX).after(Duration::from_secs(1)), Time(u64::MAX));
        assert_eq!(Time(5).since(Time(9)), Duration::ZERO);
        assert_eq!(Time(9).since(Time(5)), Duration::from_nanos(4));
    }
}
