//! The metadata cluster: decides where volumes live, who may write to them and which replicas count.
//!
//! - [`model`]: the replicated state machine, pure.
//! - [`planner`]: the leader's decisions, pure.
//! - [`raft`]: log, snapshots and network around openraft.
//! - [`rpc`]: the gRPC service and the member process.
//!
//! Architecture invariant: user data never pass through here, and while all replicas of a volume answer,
//! its I/O does not need this cluster.

#![cfg_attr(test, expect(clippy::unwrap_used, reason = "tests"))]

pub mod metrics;
pub mod model;
pub mod planner;
pub mod raft;
pub mod rpc;
