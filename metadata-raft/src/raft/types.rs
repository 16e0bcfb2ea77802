//! The types that openraft is instantiated with.

use std::fmt;

use crate::model::{Command, Response};

openraft::declare_raft_types!(
    /// Raft over the metadata model.
    pub TypeConfig:
        D = Command,
        R = Option<Response>,
);

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} kind {}", self.request, self.operation.kind())
    }
}

/// A member's number.
pub type MemberId = u64;
/// Position of an entry.
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// A vote.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// A log entry.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// Members as of a log position.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
/// The running consensus.
pub type Raft = openraft::Raft<TypeConfig, super::state_machine::StateMachine>;
