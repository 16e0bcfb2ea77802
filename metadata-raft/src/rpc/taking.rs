//! Snapshots that this member is taking, in the leader's memory.
//!
//! Invariants: a snapshot is entered before its reservation is proposed and leaves with the call that waits for it. So
//! what is pending and not here is nobody's, and may be cancelled. A report counts for one snapshot only.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ashlar_proto::ids::{ClientId, Epoch, SnapshotId};
use tokio::sync::Notify;

/// Who said that it holds its writes.
type Reporter = (ClientId, Epoch);

/// See the module.
#[derive(Default)]
pub struct Takings {
    reports: Mutex<BTreeMap<SnapshotId, Option<Reporter>>>,
    /// A report came.
    pub reported: Notify,
    /// There may be something to settle or to forget.
    pub attention: Notify,
}

impl Takings {
    fn reports(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, Option<Reporter>>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters snapshots until the guard is dropped.
    pub fn begin(&self, ids: Vec<SnapshotId>) -> Taking<'_> {
        self.reports().extend(ids.iter().map(|id| (*id, None)));
        Taking { takings: self, ids }
    }

    /// A holder reported; of no consequence where nobody waits.
    pub fn report(&self, id: SnapshotId, reporter: Reporter) {
        if let Some(report) = self.reports().get_mut(&id) {
            *report = Some(reporter);
        }
        self.reported.notify_waiters();
    }

    /// Whether a call of this member waits for a snapshot.
    pub fn contains(&self, id: SnapshotId) -> bool {
        self.reports().contains_key(&id)
    }

    /// The last report for a snapshot.
    pub fn reporter(&self, id: SnapshotId) -> Option<Reporter> {
        self.reports().get(&id).copied().flatten()
    }
}

/// Ends with the call, also one whose client has gone away.
pub struct Taking<'a> {
    takings: &'a Takings,
    ids: Vec<SnapshotId>,
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        let mut reports = self.takings.reports();
        for id in &self.ids {
            reports.remove(id);
        }
        drop(reports);
        self.takings.attention.notify_one();
    }
}
