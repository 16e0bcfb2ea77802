//! The volume descriptor: what every replica of a volume remembers of it, so that metadata can be
//! rebuilt from the disks alone, and the configuration of a holder is durable before it is relied on.
//!
//! Invariants:
//! - The byte form is fixed little-endian (docs/formats.md), independent of struct layout.
//! - `epoch` is the configuration's epoch: a replica never replaces a descriptor by one of a lower epoch.

use crate::ids::{DiskId, Epoch, ReplicaState, SnapshotNumber, VolumeId};

/// One replica of a group as Raft knew it at the descriptor's epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaDescriptor {
    /// The disk that holds the replica.
    pub disk: DiskId,
    /// Its state.
    pub state: ReplicaState,
}

/// A volume and its configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeDescriptor {
    /// The volume.
    pub volume: VolumeId,
    /// Epoch of this configuration.
    pub epoch: Epoch,
    /// Size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Fewest in-sync replicas with which writes are acknowledged.
    pub min_replicas: u8,
    /// Number that new writes carry.
    pub snapshot: SnapshotNumber,
    /// Committed snapshots that are not deleted, ascending.
    pub snapshots: Vec<SnapshotNumber>,
    /// Replica groups, in order; chunk `c` belongs to group `c mod groups.len()`.
    pub groups: Vec<Vec<ReplicaDescriptor>>,
    /// Name given by the user, at most 128 bytes of UTF-8.
    pub name: String,
}
