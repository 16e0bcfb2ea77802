//! The Raft runtime: log store, state machine, snapshots and network around openraft.
//!
//! Architecture invariants:
//! - openraft's types do not leave `raft` and `rpc::member`: its interface may move.
//! - A vote is on the device before it is answered; an entry before it counts.
//! - The state machine is in memory; what survives is the newest snapshot file plus the log after it.

pub mod codec;
pub mod config;
pub mod engine;
pub mod log_store;
pub mod network;
pub mod server;
pub mod sled_engine;
pub mod snapshot_file;
pub mod state_machine;
pub mod types;

#[cfg(test)]
mod tests;
