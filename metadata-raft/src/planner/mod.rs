//! Decisions of the leader: pure functions of the replicated state and of what heartbeats told it.
//!
//! Architecture invariant: a planner changes nothing; it returns commands, which apply checks again
//! against the state that they meet. A crash at any point is harmless.

pub mod balance;
pub mod care;
pub mod moves;
pub mod placement;
pub mod repair;

#[cfg(test)]
mod tests;

use ashlar_proto::ids::{DiskId, VolumeId};

/// What the leader knows of disks from heartbeats.
pub trait DiskView {
    /// Heartbeats arrive and the disk does not report failure.
    fn alive(&self, disk: DiskId) -> bool;
    /// Bytes in use, with what is reserved for writes that are still in the log.
    fn used_bytes(&self, disk: DiskId) -> u64;
    /// Bytes that the replicas on the disk use, whatever is being written.
    fn settled_bytes(&self, disk: DiskId) -> u64;
    /// Bytes that a volume uses on a disk; 0 where that is not known.
    fn replica_bytes(&self, disk: DiskId, volume: VolumeId) -> u64;
}
