//! Snapshots, and the index of them.
//!
//! Invariants (checked by `invariants`):
//! - the `Ready` and `Hidden` snapshots of a volume are its list's live numbers, and its `Pending` one, if any, is its highest number;
//! - a `Hidden` snapshot is live because a clone needs it (docs/snapshots.md, C2);
//! - names are unique among snapshots that are neither `Hidden` nor `Deleting`, names of groups among groups that have one;
//! - indexes are derived: [`Snapshots::insert`] and [`Snapshots::remove`] alone change them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use ashlar_proto::ids::{SnapshotGroupId, SnapshotId, SnapshotNumber, VolumeId};
use serde::{Deserialize, Serialize};

use super::cluster::Labels;
use super::volume::Format;

/// Where a snapshot is in its life: `Pending` becomes `Ready` or is gone, `Ready` becomes `Deleting`
/// at once or by way of `Hidden`, and `Deleting` is forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum SnapshotState {
    /// Its number is reserved (S1).
    Pending,
    /// Committed (S3).
    Ready,
    /// Off the live list (S8).
    Deleting {
        /// Of the first list without it.
        revision: u64,
    },
    /// Deleted by the user, and kept for the clones that need it (C2).
    Hidden,
}

/// Snapshots that were taken at one point in time.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotGroup {
    /// Identity.
    pub id: SnapshotGroupId,
    /// Its name.
    pub name: String,
}

/// A snapshot of one volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Identity.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// The volume.
    pub volume: VolumeId,
    /// It shows the layers below.
    pub number: SnapshotNumber,
    /// Of the volume when it was committed; while it is pending, when it was reserved.
    pub size_bytes: u64,
    /// The leader's clock when it was reserved.
    pub created_unix_ms: u64,
    /// Labels given by the user.
    pub labels: Labels,
    /// See there.
    pub state: SnapshotState,
    /// Taken together with others.
    pub group: Option<SnapshotGroup>,
    /// Taken for one clone of the volume: no user knows it, and it goes when the clone is made.
    pub for_clone: bool,
    /// Of the volume when it was reserved: what a clone finds on it.
    pub format: Option<Format>,
}

impl Snapshot {
    /// Whether its name is taken: it is neither deleted nor hidden.
    pub fn is_shown(&self) -> bool {
        matches!(self.state, SnapshotState::Pending | SnapshotState::Ready)
    }

    /// Whether it is on its way out.
    pub fn is_deleting(&self) -> bool {
        matches!(self.state, SnapshotState::Deleting { .. })
    }
}

/// All snapshots of a cluster.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Snapshots {
    by_id: BTreeMap<SnapshotId, Arc<Snapshot>>,
    /// Those that are shown.
    by_name: BTreeMap<String, SnapshotId>,
    by_volume: BTreeSet<(VolumeId, SnapshotId)>,
    by_group: BTreeSet<(SnapshotGroupId, SnapshotId)>,
    /// Groups with snapshots that are shown, and how many.
    group_by_name: BTreeMap<String, (SnapshotGroupId, usize)>,
    pending: BTreeSet<SnapshotId>,
    deleting: BTreeSet<(VolumeId, SnapshotId)>,
    hidden: BTreeSet<(VolumeId, SnapshotNumber)>,
    /// Ready ones that were taken for one clone.
    for_clones: BTreeSet<SnapshotId>,
}

impl Snapshots {
    /// A snapshot.
    pub fn get(&self, id: SnapshotId) -> Option<&Arc<Snapshot>> {
        self.by_id.get(&id)
    }

    /// One that is shown, by its name.
    pub fn by_name(&self, name: &str) -> Option<&Arc<Snapshot>> {
        self.get(*self.by_name.get(name)?)
    }

    /// All, oldest first (identities are ordered by time), those after `after`.
    pub fn after(&self, after: SnapshotId) -> impl Iterator<Item = &Arc<Snapshot>> {
        self.by_id
            .range((Excluded(after), Unbounded))
            .map(|(_, s)| s)
    }

    /// All, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Snapshot>> {
        self.by_id.values()
    }

    /// Those of a volume, oldest first, those after `after`.
    pub fn of_volume(
        &self,
        volume: VolumeId,
        after: SnapshotId,
    ) -> impl Iterator<Item = &Arc<Snapshot>> {
        let last = (volume, SnapshotId([0xff; 16]));
        self.by_volume
            .range((Excluded((volume, after)), Excluded(last)))
            .filter_map(|(_, id)| self.get(*id))
    }

    /// Those of a group, oldest first, those after `after`.
    pub fn of_group(
        &self,
        group: SnapshotGroupId,
        after: SnapshotId,
    ) -> impl Iterator<Item = &Arc<Snapshot>> {
        let last = (group, SnapshotId([0xff; 16]));
        self.by_group
            .range((Excluded((group, after)), Excluded(last)))
            .filter_map(|(_, id)| self.get(*id))
    }

    /// A group with snapshots that are shown, and their number.
    pub fn group_by_name(&self, name: &str) -> Option<(SnapshotGroupId, usize)> {
        self.group_by_name.get(name).copied()
    }

    /// Those whose number is reserved.
    pub fn pending(&self) -> impl Iterator<Item = SnapshotId> {
        self.pending.iter().copied()
    }

    /// Those that are deleting, by volume.
    pub fn deleting(&self) -> impl Iterator<Item = &Arc<Snapshot>> {
        self.deleting.iter().filter_map(|(_, id)| self.get(*id))
    }

    /// Ready ones that were taken for one clone.
    pub fn for_clones(&self) -> impl Iterator<Item = SnapshotId> {
        self.for_clones.iter().copied()
    }

    /// The one with a number of a volume that is not deleting.
    pub fn numbered(&self, volume: VolumeId, number: SnapshotNumber) -> Option<&Arc<Snapshot>> {
        let mut of_volume = self.of_volume(volume, SnapshotId::NIL);
        of_volume.find(|s| s.number == number && !s.is_deleting())
    }

    /// Whether a number of a volume is only kept for clones.
    pub fn is_hidden(&self, volume: VolumeId, number: SnapshotNumber) -> bool {
        self.hidden.contains(&(volume, number))
    }

    /// Whether there is something to see to: to settle, to forget, or left over.
    pub fn is_busy(&self) -> bool {
        !self.pending.is_empty() || !self.deleting.is_empty() || !self.for_clones.is_empty()
    }

    /// Number of those that are pending, ready, deleting and hidden.
    pub fn counts(&self) -> [usize; 4] {
        let (pending, deleting) = (self.pending.len(), self.deleting.len());
        let hidden = self.hidden.len();
        let ready = self.by_id.len() - pending - deleting - hidden;
        [pending, ready, deleting, hidden]
    }

    /// Adds a snapshot or replaces it.
    pub(super) fn insert(&mut self, snapshot: Snapshot) {
        self.remove(snapshot.id);
        let id = snapshot.id;
        self.by_volume.insert((snapshot.volume, id));
        match snapshot.state {
            SnapshotState::Pending => drop(self.pending.insert(id)),
            SnapshotState::Ready if snapshot.for_clone => drop(self.for_clones.insert(id)),
            SnapshotState::Ready => {}
            SnapshotState::Hidden => drop(self.hidden.insert((snapshot.volume, snapshot.number))),
            SnapshotState::Deleting { .. } => drop(self.deleting.insert((snapshot.volume, id))),
        }
        if snapshot.is_shown() {
            self.by_name.insert(snapshot.name.clone(), id);
        }
        if let Some(group) = &snapshot.group {
            self.by_group.insert((group.id, id));
            if snapshot.is_shown() {
                let entry = self.group_by_name.entry(group.name.clone());
                entry.or_insert((group.id, 0)).1 += 1;
            }
        }
        self.by_id.insert(id, Arc::new(snapshot));
    }

    /// Removes a snapshot.
    pub(super) fn remove(&mut self, id: SnapshotId) {
        let Some(snapshot) = self.by_id.remove(&id) else {
            return;
        };
        self.by_volume.remove(&(snapshot.volume, id));
        self.pending.remove(&id);
        self.deleting.remove(&(snapshot.volume, id));
        self.for_clones.remove(&id);
        if snapshot.state == SnapshotState::Hidden {
            self.hidden.remove(&(snapshot.volume, snapshot.number));
        }
        if snapshot.is_shown() {
            self.by_name.remove(&snapshot.name);
        }
        if let Some(group) = &snapshot.group {
            self.by_group.remove(&(group.id, id));
            if snapshot.is_shown()
                && let Some(entry) = self.group_by_name.get_mut(&group.name)
            {
                entry.1 -= 1;
                if entry.1 == 0 {
                    self.group_by_name.remove(&group.name);
                }
            }
        }
    }

    /// Removes all of a volume.
    pub(super) fn remove_volume(&mut self, volume: VolumeId) {
        let of_volume = self.of_volume(volume, SnapshotId::NIL);
        let ids: Vec<_> = of_volume.map(|s| s.id).collect();
        for id in ids {
            self.remove(id);
        }
    }
}
