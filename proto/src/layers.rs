//! The layer list of a volume (docs/snapshots.md, S6 and S7): which snapshots are live, and so which layers nobody can
//! tell apart.
//!
//! Invariants:
//! - `live` is ascending, without repetition, not 0, and at most `settled`.
//! - Of two lists the one with the higher revision is the newer; numbers that are not live in the older one, and at
//!   most its `settled`, are not live in the newer one.

use serde::{Deserialize, Serialize};

use std::time::Duration;

use crate::descriptor::MAX_SNAPSHOTS;
use crate::ids::SnapshotNumber;

/// Longest time that a holder holds its writes for a snapshot, from when it first saw the number (S2).
pub const HOLD_TIME: Duration = Duration::from_secs(2);
/// The leader commits only what was reported within this time after it proposed the reservation (S3).
pub const REPORT_TIME: Duration = Duration::from_millis(HOLD_TIME.as_millis() as u64 / 2);

/// See the module. The default is that of a volume that never had a snapshot.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct LayerList {
    /// Grows with every change.
    pub revision: u64,
    /// The highest number that was committed or cancelled.
    pub settled: SnapshotNumber,
    /// Committed snapshots that are not deleted.
    pub live: Vec<SnapshotNumber>,
}

/// Why a list cannot be one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("malformed layer list: {0}")]
pub struct MalformedLayers(pub &'static str);

impl LayerList {
    /// Checks the invariants.
    ///
    /// # Errors
    /// Which one does not hold.
    pub fn check(&self) -> Result<(), MalformedLayers> {
        if self.live.len() > MAX_SNAPSHOTS {
            return Err(MalformedLayers("too many snapshots"));
        }
        if self.live.first().is_some_and(|n| n.0 == 0) {
            return Err(MalformedLayers("snapshot number 0"));
        }
        if !self.live.is_sorted_by(|a, b| a < b) {
            return Err(MalformedLayers("snapshot numbers not ascending"));
        }
        if self.live.last().is_some_and(|n| *n > self.settled) {
            return Err(MalformedLayers("a live snapshot above the settled number"));
        }
        Ok(())
    }

    /// The name of the layers that nobody can tell from `layer` (S7); never below it.
    pub fn canonical(&self, layer: SnapshotNumber) -> SnapshotNumber {
        if layer >= self.settled {
            return layer;
        }
        match self.live.get(self.live.partition_point(|n| *n <= layer)) {
            Some(next) => SnapshotNumber(next.0 - 1),
            None => self.settled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(settled: u32, live: &[u32]) -> LayerList {
        LayerList {
            revision: 1,
            settled: SnapshotNumber(settled),
            live: live.iter().copied().map(SnapshotNumber).collect(),
        }
    }

    fn names(list: &LayerList, layers: std::ops::Range<u32>) -> Vec<u32> {
        layers
            .map(|l| list.canonical(SnapshotNumber(l)).0)
            .collect()
    }

    #[test]
    fn layers_between_live_snapshots_are_one() {
        assert_eq!(names(&list(0, &[]), 0..3), [0, 1, 2]);
        assert_eq!(names(&list(4, &[]), 0..7), [4, 4, 4, 4, 4, 5, 6]);
        assert_eq!(names(&list(7, &[2, 5]), 0..9), [1, 1, 4, 4, 4, 7, 7, 7, 8]);
        // A snapshot just taken: the new layer is empty so far, and not one with those below.
        assert_eq!(names(&list(3, &[3]), 0..5), [2, 2, 2, 3, 4]);
    }

    #[test]
    fn what_a_snapshot_shows_has_one_name() {
        let l = list(9, &[1, 4, 5, 9]);
        for n in &l.live {
            let newest = SnapshotNumber(n.0 - 1);
            assert_eq!(l.canonical(newest), newest, "read as layer n - 1");
        }
    }

    #[test]
    fn broken_lists_are_refused() {
        assert!(list(4, &[1, 4]).check().is_ok());
        for (settled, live) in [
            (4, vec![0, 1]),
            (4, vec![2, 2]),
            (4, vec![3, 2]),
            (4, vec![5]),
        ] {
            assert!(list(settled, &live).check().is_err(), "{live:?}");
        }
    }
}
