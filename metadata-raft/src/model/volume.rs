//! Volumes, their replica groups and their holder.
//!
//! Invariants (checked by `invariants`):
//! - every group has a replica `InSync`, and no disk twice;
//! - `rebuild_epoch` is the volume's epoch while a replica is `Rebuilding`, else 0 (R7: any open or
//!   configuration change sets a new e for every rebuild of the volume, also because a fence belongs to
//!   (disk, volume) and not to a group);
//! - a replica that is `leaving` has its successor in the same group;
//! - who may attach: a volume is published to one node exclusively, or to any number read-only;
//! - a volume has a holder or readers (R10), and what readers read is clean and made;
//! - at most one snapshot number is reserved and not settled, the highest (docs/snapshots.md, S1);
//! - a hidden volume has live snapshots, and nobody uses it or may;
//! - only a clone's replicas inherit, and one that does not never begins to (docs/snapshots.md, C1 to C7);
//! - a volume that is being reverted is opened for that only.

use std::collections::BTreeMap;

use ashlar_proto::ids::{
    CHUNK_SIZE, ClientId, DiskId, Epoch, Incarnation, NodeId, PoolId, ReplicaState, SnapshotId,
    SnapshotNumber, VolumeId,
};
use ashlar_proto::layers::LayerList;
use serde::{Deserialize, Serialize};

use super::cluster::Labels;

/// One replica of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Replica {
    /// The disk that holds it.
    pub disk: DiskId,
    /// Its state.
    pub state: ReplicaState,
    /// The store's incarnation when the replica was last promoted; 0: new.
    pub incarnation: Incarnation,
    /// Epoch e of R7 while `Rebuilding`, else 0.
    pub rebuild_epoch: Epoch,
    /// The disk whose replica takes this one's place once it is `InSync` (a move in progress).
    pub leaving_for: Option<DiskId>,
    /// It may be linked to the parent's replica on its disk: the store knows (C3).
    pub inherits: bool,
}

impl Replica {
    /// A replica of a new volume: there is nothing that it could have missed.
    pub fn new_in_sync(disk: DiskId) -> Self {
        Self {
            disk,
            state: ReplicaState::InSync,
            incarnation: Incarnation(0),
            rebuild_epoch: Epoch(0),
            leaving_for: None,
            inherits: false,
        }
    }

    /// A replica that holds nothing yet.
    pub fn new_stale(disk: DiskId) -> Self {
        Self {
            state: ReplicaState::Stale,
            ..Self::new_in_sync(disk)
        }
    }
}

/// What a clone inherits from (docs/snapshots.md, C1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Parent {
    /// The volume.
    pub volume: VolumeId,
    /// Of its snapshot; never 0.
    pub number: SnapshotNumber,
}

/// What a volume was asked to be a copy of; it may be gone since.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Source {
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A volume as it was at that moment.
    Volume(VolumeId),
}

/// A replica group: chunk `c` belongs to group `c mod groups`.
pub type Group = Vec<Replica>;

/// How a client holds a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum AttachMode {
    /// The only client.
    Exclusive,
    /// Only reads, beside any number of others.
    ReadOnly,
    /// Held by a storage daemon so that replicas can be rebuilt while nobody uses it; it goes when somebody does.
    Care,
}

/// How far a node came with making a file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FormatState {
    /// It began; until it is done the content is worth nothing.
    Formatting,
    /// It is done; final.
    Formatted,
}

/// The file system that a node made on a volume without data.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Format {
    /// How far it came.
    pub state: FormatState,
    /// `ext4`, `xfs`.
    pub fs_type: String,
}

/// The client to which the volume's epoch was granted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// The client process.
    pub client: ClientId,
    /// Its node; NIL where it is not on a registered node.
    pub node: NodeId,
    /// For people.
    pub client_name: String,
    /// How it holds the volume.
    pub mode: AttachMode,
    /// The epoch granted at open.
    pub epoch: Epoch,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Identity.
    pub id: VolumeId,
    /// Unique name.
    pub name: String,
    /// A multiple of 4096.
    pub size_bytes: u64,
    /// The pool it was placed in.
    pub pool: PoolId,
    /// Replicas per group that it was created with.
    pub replicas: u8,
    /// Fewest in-sync replicas with which writes are acknowledged.
    pub min_replicas: u8,
    /// Replica groups, never empty.
    pub groups: Vec<Group>,
    /// Epoch of this configuration; 0 before the first open.
    pub epoch: Epoch,
    /// Who holds it.
    pub holder: Option<Attachment>,
    /// The last close was clean (R2); true before the first open.
    pub clean: bool,
    /// A holder made the replicas and recorded their incarnations: data may exist.
    pub opened_once: bool,
    /// Number that new writes carry: the highest that was reserved.
    pub snapshot: SnapshotNumber,
    /// Grows with every change of the volume.
    pub revision: u64,
    /// When the leader planned it.
    pub created_unix_ms: u64,
    /// Labels given by the user.
    pub labels: Labels,
    /// Names of the nodes that may attach it; empty: nothing was said, any client may.
    pub publications: BTreeMap<String, AttachMode>,
    /// What a node formatted it with.
    pub format: Option<Format>,
    /// Clients that only read (R10), at the epoch that was current when they joined; none while there is a holder.
    pub readers: Vec<Attachment>,
    /// A reader was taken off the list and may answer reads for the rest of its lease: the next holder waits as
    /// after an unclean close.
    pub reader_revoked: bool,
    /// Which snapshots are live (S6).
    pub layers: LayerList,
    /// It was deleted and is kept for its snapshots only: its name is free, and nobody finds it.
    pub hidden: bool,
    /// Where blocks come from that it never wrote itself (C1).
    pub parent: Option<Parent>,
    /// An operator wants it to depend on its parent no more (C7).
    pub flatten: bool,
    /// The snapshot that it is being brought back to: until that is done its content is neither.
    pub reverting: Option<SnapshotId>,
    /// What it was created from.
    pub source: Option<Source>,
}

impl Volume {
    /// Bytes that one replica of one group may come to hold.
    pub fn share_bytes(&self) -> u64 {
        share_bytes(self.size_bytes, self.groups.len())
    }

    /// Every replica with its group's index.
    pub fn all_replicas(&self) -> impl Iterator<Item = (usize, &Replica)> {
        self.groups
            .iter()
            .enumerate()
            .flat_map(|(g, group)| group.iter().map(move |r| (g, r)))
    }

    /// Every disk of the volume, ascending, each once.
    pub fn disks(&self) -> Vec<DiskId> {
        let mut disks: Vec<_> = self.all_replicas().map(|(_, r)| r.disk).collect();
        disks.sort_unstable();
        disks.dedup();
        disks
    }

    /// Makes `epoch + 1` the configuration's epoch; rebuilds in progress start over under it (R7).
    pub(super) fn bump_epoch(&mut self) {
        self.epoch = Epoch(self.epoch.0 + 1);
        for replica in self.groups.iter_mut().flatten() {
            if replica.state == ReplicaState::Rebuilding {
                replica.rebuild_epoch = self.epoch;
            }
        }
    }

    /// Whether the highest number is reserved and not settled (S1).
    pub fn is_snapshot_pending(&self) -> bool {
        self.snapshot > self.layers.settled
    }

    /// Whether readers may join: nobody writes, nothing is to be reconciled, the replicas are made (R10).
    pub fn is_readable(&self) -> bool {
        self.holder.is_none() && self.clean && self.opened_once
    }

    /// Whether a replica is on its way to another disk.
    pub fn is_moving(&self) -> bool {
        self.all_replicas().any(|(_, r)| r.leaving_for.is_some())
    }

    /// Whether a replica on a disk may be linked to the parent's there.
    pub fn inherits_on(&self, disk: DiskId) -> bool {
        self.all_replicas()
            .any(|(_, r)| r.disk == disk && r.inherits)
    }

    /// Whether a storage daemon holds it because nobody else does.
    pub fn is_in_care(&self) -> bool {
        self.holder
            .as_ref()
            .is_some_and(|h| h.mode == AttachMode::Care)
    }

    /// Whether something of it is to be rebuilt and somebody has to hold it for that, as nobody uses it or is about to. What was
    /// never opened has nothing to rebuild, and who opens it first is to know that.
    pub fn needs_care(&self) -> bool {
        let unused = (self.holder.is_none() || self.is_in_care())
            && self.readers.is_empty()
            && self.publications.is_empty();
        let quiet = self.reverting.is_none();
        let behind = |(_, r): (usize, &Replica)| r.state != ReplicaState::InSync;
        let made = self.opened_once || self.source.is_some();
        unused && quiet && made && self.all_replicas().any(behind)
    }

    /// Whether its replicas are still to be made, by the first who holds it: there is nothing on any disk. A clone is never
    /// that: the disks may have copied what it inherited.
    pub fn is_unmade(&self) -> bool {
        !self.opened_once && self.source.is_none() && self.holder.is_none()
    }

    /// Whether `client` holds the volume and `epoch` is current (R0).
    pub fn is_current(&self, client: ClientId, epoch: Epoch) -> bool {
        self.epoch == epoch && self.holder.as_ref().is_some_and(|h| h.client == client)
    }
}

/// Bytes of a volume of `size_bytes` that one of `groups` groups covers, rounded up to whole chunks
/// (but not above the volume's size).
pub fn share_bytes(size_bytes: u64, groups: usize) -> u64 {
    let chunks = size_bytes
        .div_ceil(CHUNK_SIZE)
        .div_ceil((groups as u64).max(1));
    (chunks * CHUNK_SIZE).min(size_bytes)
}
