//! The metadata service of `metadata.proto`, and the member process around it.
//!
//! Architecture invariants:
//! - A mutation is one Raft command; a read is confirmed by the leader (ReadIndex; `read_barrier` shares confirmations). Followers forward the
//!   request as it came, once; a forwarded request is never forwarded again.
//! - Heartbeats and statistics live in the leader's memory only (`liveness`).
//! - Nothing holds the lock of the state across an await.

mod care_loop;
mod clones;
mod cluster;
mod convert;
mod layers;
mod liveness;
mod member;
mod move_loop;
mod observe;
mod part_service;
mod publications;
mod read_barrier;
mod repair_loop;
mod running;
mod schedule_loop;
mod schedules;
mod service;
mod snapshot_loop;
mod snapshot_view;
mod snapshots;
mod taking;
mod volumes;
mod watch;

#[cfg(test)]
mod tests;

pub use member::Member;
pub use running::{Options, Running, StartError};
