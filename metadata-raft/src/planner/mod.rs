//! Decisions of the leader: pure functions of the replicated state and of what heartbeats told it.
//!
//! Architecture invariant: a planner changes nothing; it returns commands, which apply checks again
//! against the state that they meet. A crash at any point is harmless.

pub mod care;
pub mod heal;
pub mod placement;
pub mod repair;

#[cfg(test)]
mod tests;

use ashlar_proto::ids::DiskId;

/// What the leader knows of disks from heartbeats.
pub trait DiskView {
    /// Heartbeats arrive and the disk does not report failure.
    fn alive(&self, disk: DiskId) -> bool;
    /// Bytes in use.
    fn used_bytes(&self, disk: DiskId) -> u64;
}
